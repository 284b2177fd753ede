"""The connection to a guest's agent."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from offloadd.errors import AgentError, ProtocolError
from offloadd.guest.agent.process import AgentProcess
from offloadd.guest.agent.wire import Decoder, Frame, Hello, encode
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.console import clean

CALL_S = 60.0
"""For an answer, which takes a guest milliseconds."""
_PIECE = 64 * 1024
_MAX_ENDING = 1000
"""Programs that we have let go of and that have not ended."""


class Agent:
    """A guest that we can talk to.  Made by `open_agent` alone."""

    def __init__(self, stream: trio.SocketStream, machine: str, nursery: trio.Nursery) -> None:
        self.machine = machine
        self._stream = stream
        self._nursery = nursery
        self._outgoing: deque[tuple[bytes, trio.Event]] = deque()
        """What is to be sent; each caller waits for its own, so that this stays short."""
        self._posted = trio.lowlevel.ParkingLot()
        self._numbers = itertools.count(1)
        self._processes: dict[int, AgentProcess] = {}
        self._answers: dict[int, Frame | None] = {}
        """Calls that wait; None: not answered yet."""
        self._ending: set[int] = set()
        self._answered = trio.lowlevel.ParkingLot()
        self._failure: AgentError | ProtocolError | None = None
        self._lost = trio.Event()

    async def greet(self, *, adopted: bool = False) -> None:
        """Say hello and wait for the answer: the caller has the time limit.

        Args:
            adopted: another host may have been connected before.
        Raises:
            AgentError: the connection breaks before the answer.
            ProtocolError: it is no agent, or one of another version.
        """
        hello = Hello()
        with suppress(trio.BrokenResourceError):
            await self._stream.send_all(hello.question(after_loss=adopted))
            while data := await self._stream.receive_some(_PIECE):
                try:
                    rest = hello.search(data)
                except ProtocolError as exc:
                    exc.subject = self.machine
                    raise
                if rest is not None:
                    self._nursery.start_soon(self._read, rest)
                    self._nursery.start_soon(self._write)
                    return
        raise AgentError("the agent's channel broke before its hello", subject=self.machine)

    async def wait_lost(self) -> None:
        """Wait until the connection is gone, whoever ended it."""
        await self._lost.wait()

    async def call(self, name: str, **given: Any) -> dict[str, Any]:
        """Ask for something that is done at once.

        Raises:
            AgentError: the guest cannot do it, gives no answer, or the connection is gone.
            ProtocolError: it does not keep to the protocol.
        """
        number = next(self._numbers)
        self._answers[number] = None
        try:
            with trio.move_on_after(CALL_S):
                await self.send(encode(b"C", number, json.dumps({"call": name, **given}).encode()))
                while (answer := self._answers[number]) is None:
                    self._check()
                    await self._answered.park()
                found = answer.json()
                if "error" in found:
                    raise AgentError(f"the guest cannot do {name}: {clean(str(found['error'])[:300])}", subject=self.machine)
                return found
            raise AgentError(f"gave no answer to {name} within {CALL_S:.0f} s", subject=self.machine)
        finally:
            if self._answers.pop(number) is None:
                self._ending.add(number)

    @asynccontextmanager
    async def open_process(self, program: str, *arguments: str) -> AsyncIterator[AgentProcess]:
        """Run a program: a path, or one of those that the agent has in it; leaving the block ends it.

        Raises:
            AgentError: the connection is gone.  That it could not be started is told by whatever is done with it.
        """
        number = next(self._numbers)
        process = self._processes[number] = AgentProcess(number, self.send, self.machine)
        try:
            await self.send(encode(b"R", number, json.dumps({"program": program, "arguments": arguments}).encode()))
            yield process
        finally:
            del self._processes[number]
            if not process.ended and not self._lost.is_set():
                self._ending.add(number)
                with suppress(AgentError, ProtocolError):
                    self._post(encode(b"X", number))

    async def run(self, program: str, *arguments: str) -> tuple[int, bytes]:
        """Run a program to its end; its exit status and its output of at most 1 MiB.

        Raises:
            AgentError, ProtocolError.
        """
        output = bytearray()
        async with self.open_process(program, *arguments) as process:
            await process.send_eof()
            while (piece := await process.receive()) and len(output) < 1 << 20:
                output += piece
            return await process.wait(), bytes(output)

    async def send(self, data: bytes) -> None:
        """Send whole frames: a caller that is cancelled meanwhile does not cut them off.

        Raises:
            AgentError: the connection is gone.
        """
        gone = self._post(data)
        await gone.wait()
        self._check()

    def _post(self, data: bytes) -> trio.Event:
        self._check()
        gone = trio.Event()
        self._outgoing.append((data, gone))
        self._posted.unpark_all()
        return gone

    async def _write(self) -> None:
        """Send what is posted, one after the other, until the connection ends."""
        try:
            while True:
                while self._outgoing:
                    data, gone = self._outgoing.popleft()
                    await self._stream.send_all(data)
                    gone.set()
                await self._posted.park()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._fail(AgentError("the agent's channel broke", subject=self.machine))

    async def _read(self, rest: bytes) -> None:
        """Take what the guest sends until the connection ends; `rest` has come already."""
        decoder = Decoder()
        try:
            data = rest
            while True:
                for frame in decoder.feed(data):
                    self._take(frame)
                data = await self._stream.receive_some(_PIECE)
                if not data:
                    raise AgentError("the agent's channel was closed", subject=self.machine)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._fail(AgentError("the agent's channel broke", subject=self.machine))
        except (AgentError, ProtocolError) as exc:
            exc.subject = exc.subject or self.machine
            self._fail(exc)

    def _take(self, frame: Frame) -> None:
        number = frame.channel
        if number in self._ending:
            # Under way when we let go of it.
            if frame.kind in (b"x", b"A"):
                self._ending.discard(number)
            return
        process = self._processes.get(number)
        match frame.kind:
            case b"A" if number in self._answers and self._answers[number] is None:
                self._answers[number] = frame
                self._answered.unpark_all()
            case b"O" | b"E" if process is not None:
                process.take_output(frame.kind, frame.payload)
            case b"W" if process is not None:
                process.take_window(frame.number())
            case b"x" if process is not None and not process.ended:
                process.take_exit(frame.json())
            case b"W":
                return  # for a program that has ended
            case _:
                raise ProtocolError(f"the agent sent a frame {frame.kind!r} of a channel {number} that is not open")

    def _fail(self, error: AgentError | ProtocolError) -> None:
        self._failure = error
        for process in self._processes.values():
            process.fail(error)
        self._answered.unpark_all()
        while self._outgoing:
            self._outgoing.popleft()[1].set()
        self._lost.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.what, subject=self.machine) from self._failure
        if len(self._ending) > _MAX_ENDING:
            raise AgentError(f"{_MAX_ENDING} programs do not end", subject=self.machine)


@asynccontextmanager
async def open_agent(socket: Path, machine: str) -> AsyncIterator[Agent]:
    """A connection to the agent behind a Unix socket; nothing can be done with it before `greet`.

    Raises:
        AgentError: the connection cannot be made.
    """
    try:
        stream = await trio.open_unix_socket(str(socket))
    except OSError as exc:
        raise AgentError(f"the agent's channel cannot be opened: {exc.strerror}", subject=machine) from exc
    async with stream, open_narrow_nursery() as nursery:
        try:
            yield Agent(stream, machine, nursery)
        finally:
            nursery.cancel_scope.cancel()
