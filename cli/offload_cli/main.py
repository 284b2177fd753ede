"""The entry point of `offload`: all commands, and how errors end them."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from offload_cli.terminal import discard, say, say_error
from offload_cli.words import EXIT_STATUSES
from offloadd import __version__
from offloadd.errors import HostError, OffloadError, is_disk_full

INTERRUPTED = 130

COMMANDS = {
    "build": "build",
    "route": "route",
    "builds": "builds",
    "log": "builds",
    "cancel": "builds",
    "guix-hook": "hooks",
    "nix-hook": "hooks",
    "doctor": "doctor",
    "image": "images",
    "env": "environments",
    "template": "templates",
    "machine": "machine",
    "vm": "vm",
    "secrets": "secrets",
    "binfmt": "binfmt",
    "guix": "guix",
    "nix": "nix",
    "quirks": "quirks",
    "daemon": "daemon",
}
"""Command -> its module, in the order of `--help`: groups come last."""


class _Commands(TyperGroup):
    """All commands.  An error of ours is a message and an exit status, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OffloadError as exc:
            say_error(exc)
            raise typer.Exit(exc.exit_status) from exc
        except KeyboardInterrupt as exc:
            # Also SIGTERM and SIGHUP: then the terminal may be gone.
            with suppress(OSError):
                say("interrupted")
            raise typer.Exit(INTERRUPTED) from exc
        except BrokenPipeError as exc:
            # Whoever read our output (`| head`) has enough.
            discard(sys.stdout)
            raise typer.Exit(128 + signal.SIGPIPE) from exc


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offload {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit."),
) -> None:
    """Send a build to the machine that it needs: of another architecture, date or CPU; and bring the result back.

    That machine is this host, qemu-user, a virtual machine or a remote host; `offload route` says which, and why.

    \b
    Examples:
      offload build -s aarch64-linux hello
      offload build --date 2020-06-01 ./project
      offload build -p gcc -p make ./project -- make check
      offload doctor
    """


def make_app(word: str = "") -> typer.Typer:
    """The command line.

    Args:
        word: what comes first in it: a command is alone, as to load all others takes as long as many a command does.
    """
    app = typer.Typer(
        cls=_Commands,
        name="offload",
        epilog=EXIT_STATUSES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=_options,
    )
    for module in [COMMANDS[word]] if word in COMMANDS else dict.fromkeys(COMMANDS.values()):
        import_module(f"offload_cli.{module}").add_to(app)
    return app


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point.

    A command of 0.2 s feels each hundredth: pydantic is not to look for plugins among all that is installed, and the process
    ends without taking its modules apart.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # `nohup` has SIGHUP ignored, and means it.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    status, full = 0, False
    try:
        make_app(sys.argv[1] if len(sys.argv) > 1 else "")(prog_name="offload")
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except OSError as exc:
        full = is_disk_full(exc)
        if not full:
            raise
    # Also what could not be written before is in there still.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as exc:
            full = full or is_disk_full(exc)
        except ValueError:
            pass  # it is closed
    if full:
        with suppress(OSError):
            say_error(HostError("the disk is full: not all of the output was written"))
        status = status or HostError.exit_status
    os._exit(status)


if __name__ == "__main__":
    main()
