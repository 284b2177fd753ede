"""The connection to a guest's agent."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from offloadd.errors import AgentError, ProtocolError, UsageError
from offloadd.guest.agent.process import AgentProcess
from offloadd.guest.agent.tree import PACK, UNPACK, packed, unpack
from offloadd.guest.agent.wire import MAX_PAYLOAD, Decoder, Frame, Hello, encode
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.console import clean

CALL_S = 60.0
"""For an answer, which takes a guest milliseconds."""
MAX_OUTPUT = 1 << 20
"""Bytes of a program's output that `Agent.run` keeps."""
MAX_ENDING = 1000
"""Programs that we have let go of, and calls that we do not wait for any more, of which the agent has not said an end."""
_PIECE = 64 * 1024


@dataclass(eq=False)
class _Posted:
    frame: bytes
    gone: trio.Event = field(default_factory=trio.Event)

    def is_input_of(self, channel: int) -> bool:
        return self.frame[:1] == b"I" and self.frame[1:5] == channel.to_bytes(4, "big")


class Agent:
    """A guest that we can talk to.  Made by `open_agent` alone."""

    def __init__(self, stream: trio.abc.Stream, machine: str, nursery: trio.Nursery) -> None:
        self.machine = machine
        self._stream = stream
        self._nursery = nursery
        self._outgoing: deque[_Posted] = deque()
        """What is to be sent, beside at most a window of input for each program that runs."""
        self._changed = trio.lowlevel.ParkingLot()
        """There is something to send."""
        self._numbers = itertools.count(1)
        self._processes: dict[int, AgentProcess] = {}
        self._answers: dict[int, Frame | None] = {}
        """Calls that wait; None: not answered yet."""
        self._ending: dict[int, AgentProcess | None] = {}
        """What we have let go of and the agent has not; None: a call."""
        self._answered = trio.lowlevel.ParkingLot()
        self._failure: AgentError | ProtocolError | None = None
        self._lost = trio.Event()

    async def greet(self, *, adopted: bool = False) -> None:
        """Say hello, and with it what was asked already, and wait for the answer: the caller has the time limit.

        Args:
            adopted: another host may have been connected before.
        Raises:
            AgentError: the connection breaks before the answer.
            ProtocolError: it is no agent, or one of another version.
        """
        hello = Hello()
        with suppress(trio.BrokenResourceError):
            # In one piece: a guest that was saved wakes up once for both.
            posted, self._outgoing = self._outgoing, deque()
            await self._stream.send_all(hello.question(after_loss=adopted) + b"".join(one.frame for one in posted))
            while data := await self._stream.receive_some(_PIECE):
                try:
                    rest = hello.search(bytes(data))
                except ProtocolError as exc:
                    exc.subject = self.machine
                    raise
                if rest is not None:
                    self._nursery.start_soon(self._read, rest)
                    self._nursery.start_soon(self._write)
                    self._nursery.start_soon(self._hang_up)
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
        return await self.answer(name, self.ask(name, **given))

    def ask(self, name: str, **given: Any) -> int:
        """The first half of `call`, also before `greet`: the number of the question.

        Raises:
            AgentError: the connection is gone.
        """
        number = next(self._numbers)
        self.post(encode(b"C", number, json.dumps({"call": name, **given}).encode()))
        self._answers[number] = None
        return number

    async def answer(self, name: str, number: int) -> dict[str, Any]:
        """The second half, which raises the same."""
        try:
            with trio.move_on_after(CALL_S):
                while (answer := self._answers[number]) is None:
                    self._check()
                    await self._answered.park()
                found = answer.json()
                if "error" in found:
                    raise AgentError(f"the guest cannot do {name}: {clean(str(found['error'])[:300])}", subject=self.machine)
                return found
            raise AgentError(f"gave no answer to {name} within {CALL_S:.0f} s", subject=self.machine)
        except ProtocolError as exc:
            exc.subject = self.machine
            raise
        finally:
            if self._answers.pop(number) is None:
                self._let_go(number, None)

    @asynccontextmanager
    async def open_process(self, program: str, *arguments: str) -> AsyncIterator[AgentProcess]:
        """Run a program: a path, or one of those that the agent has in it.  Leaving the block hangs up on it.

        Raises:
            AgentError: the connection is gone.  That it could not be started is told by whatever is done with it.
            UsageError: the command is too long.
        """
        words = json.dumps({"program": program, "arguments": arguments}).encode()
        if len(words) > MAX_PAYLOAD:
            raise UsageError(f"a command for the guest is longer than {MAX_PAYLOAD >> 10} KiB", subject=self.machine)
        number = next(self._numbers)
        # Nothing here waits for the guest: it may not read, and whoever runs a program has its limits inside the block.
        self.post(encode(b"R", number, words))
        process = self._processes[number] = AgentProcess(number, self, self.machine)
        try:
            yield process
        finally:
            del self._processes[number]
            if not process.ended:
                process.drop()
                # What it will not read does not wait for a guest that reads nothing.
                for posted in [posted for posted in self._outgoing if posted.is_input_of(number)]:
                    self._outgoing.remove(posted)
                    posted.gone.set()
                with suppress(AgentError, ProtocolError):
                    self.post(encode(b"X", number))
                self._let_go(number, process)

    async def run(self, program: str, *arguments: str) -> tuple[int, bytes]:
        """Run a program to its end; its exit status and the first MiB of its output.

        Raises:
            AgentError, ProtocolError, UsageError: as `open_process`; it cannot be started.
        """
        output = bytearray()
        async with self.open_process(program, *arguments) as process, open_narrow_nursery() as nursery:
            nursery.start_soon(_drop_errors, process)
            await process.send_eof()
            while piece := await process.receive():
                output += piece[: MAX_OUTPUT - len(output)]
            return await process.wait(), bytes(output)

    async def put(self, pieces: AsyncIterable[bytes], directory: str) -> None:
        """Unpack a tree in the guest, as root: owners and modes are those of the tar.

        Args:
            pieces: a tar; more of it is asked for when the guest has room.
            directory: exists in the guest.
        Raises:
            AgentError: the guest's `tar` failed, with what it said; or as `run`.
        """
        async with self.open_process(*UNPACK, "--directory", directory) as process:
            await unpack(process, pieces)

    @asynccontextmanager
    async def get(self, directory: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Pack a tree of the guest: the block gets the pieces of a tar, as fast as it takes them.

        It may be anything, of any size: `open_outputs_receiver` has the bounds, `unpack_outputs` the checks.

        Raises:
            AgentError: the guest's `tar` failed, told behind the last piece with what it said; or as `run`.
        """
        async with self.open_process(*PACK, "--directory", directory, ".") as process, packed(process) as pieces:
            yield pieces

    def post(self, frame: bytes) -> trio.Event:
        """As `Line.post`."""
        self._check()
        posted = _Posted(frame)
        self._outgoing.append(posted)
        self._changed.unpark_all()
        return posted.gone

    async def send(self, frame: bytes) -> None:
        """As `Line.send`: a caller that is cancelled meanwhile does not cut the frame off."""
        await self.post(frame).wait()
        self._check()

    async def _write(self) -> None:
        """Send what is posted, one after the other, until the connection ends."""
        try:
            while True:
                while self._outgoing:
                    posted = self._outgoing.popleft()
                    await self._stream.send_all(posted.frame)
                    posted.gone.set()
                await self._changed.park()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._fail(AgentError("the agent's channel broke", subject=self.machine))

    async def _read(self, rest: bytes) -> None:
        """Take what the guest sends until the connection ends; `rest` has come already."""
        decoder = Decoder()
        data = rest
        try:
            while True:
                for frame in decoder.feed(data):
                    self._take(frame)
                data = bytes(await self._stream.receive_some(_PIECE))
                if not data:
                    raise AgentError("the agent's channel was closed")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._fail(AgentError("the agent's channel broke", subject=self.machine))
        except (AgentError, ProtocolError) as exc:
            exc.subject = self.machine
            self._fail(exc)

    async def _hang_up(self) -> None:
        """Close a connection that is of no use any more: QEMU has room for one, and the next may be waiting."""
        await self._lost.wait()
        await trio.aclose_forcefully(self._stream)

    def _take(self, frame: Frame) -> None:
        number = frame.channel
        process = self._processes.get(number) or self._ending.get(number)
        match frame.kind:
            case b"A" if number in self._answers and self._answers[number] is None:
                self._answers[number] = frame
                self._answered.unpark_all()
            case b"A" if number in self._ending and process is None:
                del self._ending[number]
            case b"x" if number in self._ending and process is not None:
                del self._ending[number]
            case b"O" | b"E" if process is not None and not process.ended:
                process.take_output(frame.kind, frame.payload)
            case b"W" if process is not None and not process.ended:
                process.take_window(frame.number())
            case b"x" if process is not None and not process.ended:
                process.take_exit(frame.json())
            case _:
                raise ProtocolError(f"the agent sent a frame {frame.kind!r} of a channel {number} that is not open")

    def _let_go(self, number: int, process: AgentProcess | None) -> None:
        """The agent still owes us an end of this; an honest one does not owe many."""
        self._ending[number] = process
        if len(self._ending) > MAX_ENDING:
            self._fail(AgentError(f"{MAX_ENDING} programs and calls do not end", subject=self.machine))

    def _fail(self, error: AgentError | ProtocolError) -> None:
        self._failure = self._failure or error
        for process in self._processes.values():
            process.fail(self._failure)
        self._answered.unpark_all()
        while self._outgoing:
            self._outgoing.popleft().gone.set()
        self._lost.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.what, subject=self.machine) from self._failure


async def _drop_errors(process: AgentProcess) -> None:
    """Standard error of a program, which nobody wants and which must not stand in its way."""
    while await process.receive_error():
        pass


@asynccontextmanager
async def open_agent(socket: Path, machine: str) -> AsyncIterator[Agent]:
    """A connection to the agent behind a Unix socket; nothing can be done with it before `greet`.

    Raises:
        AgentError: the connection cannot be made.
    """
    try:
        stream = await trio.open_unix_socket(str(socket))
    except OSError as exc:
        raise AgentError(f"the agent's channel cannot be opened: {exc.strerror or exc}", subject=machine) from exc
    async with stream, open_narrow_nursery() as nursery:
        try:
            yield Agent(stream, machine, nursery)
        finally:
            nursery.cancel_scope.cancel()
