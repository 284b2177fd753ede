"""A program in the guest, as the host holds it."""

from __future__ import annotations

from typing import Any, Protocol

import trio

from offloadd.errors import AgentError, ProtocolError
from offloadd.guest.agent.wire import MAX_PAYLOAD, WINDOW, encode
from offloadd.vm.console import clean


class Line(Protocol):
    """What frames go out on."""

    def post(self, frame: bytes) -> trio.Event:
        """Send a frame some time; the event is set when it has gone, or never will.  AgentError: the connection is gone."""

    async def send(self, frame: bytes) -> None:
        """Send a frame, and wait until it has gone.  AgentError: the connection is gone."""


class AgentProcess:
    """One program with its three streams, as bytes.  Made by `Agent.open_process` alone.

    What the guest may send is bounded by a window for both streams, which opens again only when somebody takes what has come:
    who takes nothing of one of them may in the end get nothing of the other.
    """

    def __init__(self, channel: int, line: Line, machine: str) -> None:
        self.channel = channel
        self._line = line
        self._machine = machine
        self._output = bytearray()
        self._error = bytearray()
        self._under_way = 0
        """Bytes that the guest has sent and that we have not given back to its window."""
        self._taken = 0
        """Of these, what somebody has taken."""
        self._given: trio.Event | None = None
        """Set when the last that was given back has left for the guest."""
        self._room = WINDOW
        """Bytes that the guest takes from us."""
        self._dropped = False
        self._status: int | None = None
        self._failure: AgentError | ProtocolError | None = None
        self._changed = trio.lowlevel.ParkingLot()

    # What the guest says

    def take_output(self, kind: bytes, data: bytes) -> None:
        """Output has come; ProtocolError when it is more than the window."""
        self._under_way += len(data)
        if self._under_way > WINDOW:
            raise ProtocolError("the agent sent more output than was asked for", subject=self._machine)
        if not self._dropped:
            # Not a list of pieces: each costs more than the one byte that may be in it.
            buffer = self._output if kind == b"O" else self._error
            buffer += data
            self._changed.unpark_all()

    def take_window(self, size: int) -> None:
        """The guest has taken some input; ProtocolError when that is nothing, or more than was sent."""
        self._room += size
        if not size or self._room > WINDOW:
            raise ProtocolError(f"the agent took {size} bytes of input, which were not sent", subject=self._machine)
        self._changed.unpark_all()

    def take_exit(self, exit_: dict[str, Any]) -> None:
        """The program has ended or could not be started."""
        status = exit_.get("status")
        if "error" in exit_:
            why = clean(str(exit_["error"])[:300])
            self.fail(AgentError(f"the agent cannot run a program: {why}", subject=self._machine))
        elif type(status) is not int or not 0 <= status <= 255:
            raise ProtocolError(f"the agent sent the exit status {repr(status)[:50]}", subject=self._machine)
        else:
            self._status = status
            self._changed.unpark_all()

    def fail(self, error: AgentError | ProtocolError) -> None:
        """Nothing more will come: everybody who waits gets `error`, after what had come before."""
        self._failure = self._failure or error
        self._changed.unpark_all()

    # What the host wants

    async def send(self, data: bytes) -> None:
        """Write to standard input, waiting while the guest is slow.

        Raises:
            AgentError: the program has ended, or the channel broke.
        """
        rest = memoryview(data)
        while rest:
            while not self._room and not self.ended:
                await self._changed.park()
            self._check()
            if self._status is not None:
                raise AgentError("the program has ended", subject=self._machine)
            piece = rest[: min(self._room, MAX_PAYLOAD)]
            self._room -= len(piece)
            rest = rest[len(piece) :]
            await self._line.send(encode(b"I", self.channel, piece))

    async def send_eof(self) -> None:
        """Standard input is at its end.

        Raises:
            AgentError: the channel broke.
        """
        self._check()
        if self._status is None:
            await self._line.send(encode(b"i", self.channel))

    async def receive(self) -> bytes:
        """Some of standard output, at most 256 KiB; empty at its end.

        Raises:
            AgentError: the program could not be started, or the channel broke.
            ProtocolError: the guest does not keep to the protocol.
        """
        return await self._receive(self._output)

    async def receive_error(self) -> bytes:
        """The same for standard error."""
        return await self._receive(self._error)

    async def wait(self) -> int:
        """The exit status; 128+N after signal N.  Somebody must take the output meanwhile, unless it is less than a window.

        Raises:
            AgentError, ProtocolError: as `receive`.
        """
        await trio.lowlevel.checkpoint()
        while self._status is None:
            self._check()
            await self._changed.park()
        return self._status

    async def signal(self, number: int) -> None:
        """Send a signal to the program and to what it has started.

        Raises:
            AgentError: the channel broke.
        """
        if self._status is None:
            self._check()
            await self._line.send(encode(b"K", self.channel, bytes([number])))

    def drop(self) -> None:
        """Nobody takes its output any more; what still comes is only counted."""
        self._dropped = True
        self._output.clear()
        self._error.clear()

    @property
    def ended(self) -> bool:
        """Whether the guest will say no more of it."""
        return self._status is not None or self._failure is not None

    async def _receive(self, buffer: bytearray) -> bytes:
        await trio.lowlevel.checkpoint()
        while not buffer:
            if self._status is not None:
                return b""
            self._check()
            await self._changed.park()
        data = bytes(buffer)
        buffer.clear()
        self._taken += len(data)
        # Not for each piece: a frame for the guest costs it as much as many bytes.  And one after the other: a guest that sends
        # without a pause and reads nothing must not have them pile up here.
        if self._taken >= WINDOW // 4 and not self.ended and (self._given is None or self._given.is_set()):
            size, self._taken = self._taken, 0
            self._under_way -= size
            # Without waiting: who is cancelled there would lose the data.
            self._given = self._line.post(encode(b"W", self.channel, size.to_bytes(4, "big")))
        return data

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.what, subject=self._machine, hint=self._failure.hint) from self._failure
