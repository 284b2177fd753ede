"""The guest's agent as a process of this host, behind a stand-in for QEMU's end of its port.

It must never be asked to `identify` or to set a date: that would be this host's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from offloadd.guest.agent import Agent, open_agent
from tests.guest_modules import GUEST

LIMIT_S = 30.0


class RealAgent:
    """An agent, and a Unix socket where one host at a time reaches it, as QEMU lets it."""

    def __init__(self, path: Path, ours: trio.SocketStream, theirs: socket.socket) -> None:
        self.path = path
        self._ours = ours
        self._theirs = theirs
        self._serving = trio.CancelScope()
        self._connection = trio.CancelScope()
        self.process = self._start()

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        number = self._theirs.fileno()
        command = [sys.executable, "-IS", str(GUEST / "guest-agent"), str(number), *words]
        return subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """As the guest's init does."""
        self.process = self._start("again")

    @asynccontextmanager
    async def connect(self, *, adopted: bool = False) -> AsyncIterator[Agent]:
        async with open_agent(self.path, "vm") as agent:
            with trio.fail_after(LIMIT_S):
                await agent.greet(adopted=adopted)
                yield agent

    def children(self) -> list[int]:
        """The agent's programs, and those that have ended and that it has not noted yet."""
        if self.process.poll() is not None:
            return []
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def disconnect(self) -> None:
        """The connection breaks; another one can be made."""
        self._connection.cancel()

    def end(self) -> None:
        """As when QEMU ends: nobody is behind the socket any more."""
        self._serving.cancel()

    async def serve(self, listener: trio.socket.SocketType) -> None:
        with self._serving, listener:
            while True:
                connection, _ = await listener.accept()
                async with trio.SocketStream(connection) as host, trio.open_nursery() as nursery:
                    self._connection = nursery.cancel_scope
                    nursery.start_soon(_copy, host, self._ours, nursery.cancel_scope)
                    nursery.start_soon(_copy, self._ours, host, nursery.cancel_scope)


async def _copy(source: trio.SocketStream, target: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Until the host has gone: what is under way then is lost, and neither end is told."""
    try:
        # As much as QEMU takes at a time.
        while data := await source.receive_some(4096):
            await target.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


@asynccontextmanager
async def open_real_agent() -> AsyncIterator[RealAgent]:
    """An agent that nobody is connected to yet."""
    ours, theirs = socket.socketpair()
    with (
        tempfile.TemporaryDirectory(prefix="offload-", dir="/tmp") as folder,
        theirs,
        trio.socket.socket(socket.AF_UNIX) as listener,
    ):
        path = Path(folder) / "agent.sock"
        await listener.bind(str(path))
        listener.listen(1)
        agent = RealAgent(path, trio.SocketStream(trio.socket.from_stdlib_socket(ours)), theirs)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(agent.serve, listener)
                yield agent
                nursery.cancel_scope.cancel()
        finally:
            for child in agent.children():
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(child, signal.SIGKILL)
            agent.kill()
            ours.close()
