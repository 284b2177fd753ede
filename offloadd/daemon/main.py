"""`offloadd`: the daemon in the foreground."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from offloadd import __version__
from offloadd.daemon.api import make_api
from offloadd.daemon.doors import open_doors
from offloadd.daemon.service import Service, open_service
from offloadd.errors import HostError, NotAllowedError, OffloadError
from offloadd.model.quantity import parse_duration
from offloadd.nursery import open_narrow_nursery
from offloadd.paths import Paths, find_paths, make_private

log = structlog.get_logger()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `offloadd`."""
    options = _parse(arguments)
    _set_up_logging()
    try:
        trio.run(partial(run_daemon, find_paths(), idle_timeout_s=options.idle_timeout))
    except* OffloadError as group:
        error = group.exceptions[0]
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.stderr.write(f"offloadd: {error.render()}\n")
        sys.exit(error.exit_status)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="offloadd",
        description="The daemon that owns the machines and runs the builds. `offload` starts one by itself when none answers.",
        epilog="SIGTERM and SIGINT end it: builds get a moment to finish, then machines are shut down.",
    )
    idle = "end when nothing was asked for this long (10m); default: never"
    parser.add_argument("--idle-timeout", type=_duration, default=0.0, metavar="TIME", help=idle)
    parser.add_argument("--version", action="version", version=f"offloadd {__version__}")
    return parser.parse_args(arguments)


def _duration(text: str) -> float:
    try:
        return 0.0 if text == "0" else parse_duration(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _set_up_logging() -> None:
    lines = structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"])
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else lines,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)


async def run_daemon(paths: Paths, *, idle_timeout_s: float) -> None:
    """Serve until SIGTERM, SIGINT, a request to stop, or idleness.

    Raises:
        NotAllowedError: another daemon has this state, or this socket.
    """
    make_private(paths.state)
    make_private(paths.runtime)
    # Both: who sets one of their variables alone would have two daemons with one socket, or with one state.
    with _only_one(paths.state), _only_one(paths.runtime), _listen(paths.socket) as listener:
        # The signals are outermost: a second one hurries what the first has begun.
        async with open_narrow_nursery() as nursery:
            async with open_service(paths, idle_timeout_s=idle_timeout_s) as service, open_doors(service) as doors:
                nursery.start_soon(_stop_on_signal, service)
                log.info("serving", socket=str(paths.socket), pid=os.getpid(), version=__version__)
                await serve(cast("Any", make_api(service, doors)), _config(listener), shutdown_trigger=service.wait_at_rest)
                paths.socket.unlink(missing_ok=True)
            nursery.cancel_scope.cancel()
    log.info("ended")


def _only_one(directory: Path) -> Any:
    """A lock that the kernel takes back whatever happens to us."""
    lock = (directory / "offloadd.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        what = f"runs already for this user, with {directory}"
        raise NotAllowedError(what, subject="offloadd", hint="offload daemon status") from exc
    return lock


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)  # a killed daemon's; we hold the lock of its folder
    try:
        # The folder is for us alone, so nobody can be faster than chmod.
        listener.bind(str(path))
        path.chmod(0o600)
    except OSError as exc:
        listener.close()
        hint = "a socket's path holds 107 bytes: set XDG_RUNTIME_DIR to a shorter one"
        raise HostError(f"cannot listen: {exc}", subject=str(path), hint=hint) from exc
    return listener


def _config(listener: socket.socket) -> Config:
    config = Config()
    # hypercorn closes what it is given; ours stays open until the block ends.
    config.bind = [f"fd://{os.dup(listener.fileno())}"]
    config.graceful_timeout = 5
    config.read_timeout = None
    config.keep_alive_timeout = 5
    config.h11_max_incomplete_size = 1024 * 1024
    config.errorlog = None
    config.accesslog = None
    return config


async def _stop_on_signal(service: Service) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            if service.stopping.is_set():
                log.warning("second signal: ending builds at once")
            log.info("stopping", signal=signal.Signals(number).name)
            service.stop()


if __name__ == "__main__":
    main()
