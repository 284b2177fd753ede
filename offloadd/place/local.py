"""A build on this host: the build service as a child process, in an environment that is unpacked here.

With the root of a foreign architecture this is user emulation: the kernel starts qemu-user for its programs (binfmt_misc).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from subprocess import PIPE

import trio

from offloadd.builder.run import run_build
from offloadd.cache import as_mapped_root
from offloadd.errors import HostError
from offloadd.nursery import open_narrow_nursery
from offloadd.paths import make_private, shipped
from offloadd.place.limits import limit_processes
from offloadd.place.place import Place
from offloadd.place.stuck import watch_stuck
from offloadd.process import program_environment
from offloadd.spare_user import reserve_user

BWRAP = Path("/usr/bin/bwrap")
END_S = 60.0
"""For a build service to remove what its build has made; a later one removes the rest."""
_PIECE = 64 * 1024


class LocalProcess:
    """A build service that runs on this host.  Made by `LocalService` alone."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._input, self._output, self._errors = process.stdin, process.stdout, process.stderr
        self.last_activity = trio.current_time()
        """When something was sent or came last, on trio's clock."""

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, data: bytes) -> None:
        """Write to standard input, waiting while it is slow.

        Raises:
            HostError: the service has ended.
        """
        try:
            await self._input.send_all(data)
        except trio.BrokenResourceError as exc:
            raise HostError("the build service went away") from exc
        self.last_activity = trio.current_time()

    async def receive(self) -> bytes:
        """Some of standard output; empty at its end."""
        data = bytes(await self._output.receive_some(_PIECE))
        self.last_activity = trio.current_time()
        return data

    async def receive_error(self) -> bytes:
        """The same for standard error."""
        return bytes(await self._errors.receive_some(_PIECE))

    async def close(self) -> None:
        """End the build and wait until nothing of it is left."""
        with trio.CancelScope(shield=True):
            await self._input.aclose()
            # Without a reader it cannot hang in what it still wanted to say.
            await self._output.aclose()
            with trio.move_on_after(END_S):
                await self._process.wait()
            if self._process.returncode is None:
                # When the service is killed the kernel kills everything that is below it.
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                await self._process.wait()
            await self._errors.aclose()


class LocalService:
    """The build service of this host.

    Args:
        state: a directory of ours; builds on this host may share it.
        stuck_timeout_s: seconds without output and processor time after which an emulator is taken to hang.
    """

    def __init__(self, state: Path, *, stuck_timeout_s: float | None = None) -> None:
        self._state = state
        self._stuck_timeout_s = stuck_timeout_s

    @asynccontextmanager
    async def open_process(self) -> AsyncIterator[LocalProcess]:
        """Start it; when the block is left nothing of the build runs any more and its directory is gone.

        Raises:
            HostError: it cannot be started.
            EmulatorFault: the build is stuck.
        """
        check_sandbox()
        with build_user() as user:
            process = LocalProcess(await _start(self._argv(user)))
            try:
                # It has not been told what to do yet.
                limit_processes(process.pid)
                async with open_narrow_nursery() as nursery:
                    if self._stuck_timeout_s is not None:
                        nursery.start_soon(watch_stuck, process.pid, self._stuck_timeout_s, lambda: process.last_activity)
                    yield process
                    nursery.cancel_scope.cancel()
            finally:
                await process.close()

    def _argv(self, user: int | None) -> list[str]:
        service = shipped() / "images/guest/build-service"
        state = make_private(self._state)
        # The Python that runs us: a host's own may be older, or elsewhere.
        argv = [sys.executable, "-IS", str(service), "--state", str(state), "--clock", "keep"]
        return as_mapped_root(argv) if user is None else [*argv, "--user", str(user)]


@asynccontextmanager
async def open_local_place(root: Path, state: Path, *, stuck_timeout_s: float | None = None) -> AsyncIterator[Place]:
    """A place on this host.

    Args:
        root: of the unpacked environment; somebody keeps it from being removed (`RootStore.open`).
        state: see `LocalService`.
    """
    yield Place(
        run=partial(run_build, LocalService(state, stuck_timeout_s=stuck_timeout_s)),
        environment=str(root),
        clock=time.time,
    )


def check_sandbox() -> None:
    """Raise `HostError` when bubblewrap is missing."""
    if not BWRAP.exists():
        raise HostError("not installed", subject="bwrap", hint="sudo apt-get install bubblewrap")


@contextmanager
def build_user() -> Iterator[int | None]:
    """Whom builds run as when we are root.  Else our user namespace has enough users, and they are nobody else's."""
    if os.geteuid():
        yield None
        return
    with reserve_user("build") as uid:
        yield uid


async def _start(argv: list[str]) -> trio.Process:
    try:
        # A session of its own: Ctrl-C in the terminal of a daemon is the daemon's.
        return await trio.lowlevel.open_process(
            argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=program_environment(), cwd="/", start_new_session=True
        )
    except OSError as exc:
        raise HostError(f"cannot start the build service: {exc.strerror}", subject=argv[0]) from exc
