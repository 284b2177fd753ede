"""A program in the guest, as the host holds it."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from offloadd.errors import AgentError, ProtocolError
from offloadd.guest.agent.wire import MAX_PAYLOAD, WINDOW, encode
from offloadd.vm.console import clean

Send = Callable[[bytes], Awaitable[None]]


class AgentProcess:
    """One program with its three streams, as bytes.  Made by `Agent.open_process` alone.

    What the guest may send is bounded by a window, which grows again only when somebody takes what has come.
    """

    def __init__(self, channel: int, send: Send, machine: str) -> None:
        self.channel = channel
        self._send = send
        self._machine = machine
        self._output: deque[bytes] = deque()
        self._error: deque[bytes] = deque()
        self._under_way = 0
        """Bytes that the guest has sent and that we have not given back to its window."""
        self._taken = 0
        """Of these, what somebody has taken."""
        self._room = WINDOW
        """Bytes that the guest takes from us."""
        self._status: int | None = None
        self._failure: AgentError | ProtocolError | None = None
        self._changed = trio.lowlevel.ParkingLot()

    # What the guest says

    def take_output(self, kind: bytes, data: bytes) -> None:
        """Output has come; ProtocolError when it is more than the window."""
        self._under_way += len(data)
        if self._under_way > WINDOW:
            raise ProtocolError("the agent sent more output than was asked for", subject=self._machine)
        if self._status is not None:
            raise ProtocolError("the agent sent output of a program that has ended", subject=self._machine)
        if data:
            (self._output if kind == b"O" else self._error).append(data)
            self._changed.unpark_all()

    def take_window(self, size: int) -> None:
        """The guest has taken some input; ProtocolError when that is more than was sent."""
        self._room += size
        if self._room > WINDOW:
            raise ProtocolError("the agent took more input than was sent", subject=self._machine)
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
            while not self._room and self._failure is None and self._status is None:
                await self._changed.park()
            self._check()
            if self._status is not None:
                raise AgentError("the program has ended", subject=self._machine)
            piece = rest[: min(self._room, MAX_PAYLOAD)]
            self._room -= len(piece)
            rest = rest[len(piece) :]
            await self._send(encode(b"I", self.channel, bytes(piece)))

    async def send_eof(self) -> None:
        """Standard input is at its end."""
        self._check()
        await self._send(encode(b"i", self.channel))

    async def receive(self) -> bytes:
        """Some of standard output; empty at its end."""
        return await self._receive(self._output)

    async def receive_error(self) -> bytes:
        """The same for standard error."""
        return await self._receive(self._error)

    async def wait(self) -> int:
        """The exit status; 128+N after signal N.  What it has said and nobody takes is dropped."""
        while self._status is None:
            self._check()
            await self._changed.park()
        return self._status

    async def signal(self, number: int) -> None:
        """Send a signal to the program and to what it has started."""
        if self._status is None:
            self._check()
            await self._send(encode(b"K", self.channel, b"%d" % number))

    @property
    def ended(self) -> bool:
        """Whether the guest will say no more of it."""
        return self._status is not None or self._failure is not None

    async def _receive(self, queue: deque[bytes]) -> bytes:
        while not queue:
            if self._status is not None:
                return b""
            self._check()
            await self._changed.park()
        data = queue.popleft()
        self._taken += len(data)
        # Not for each piece: a frame for the guest costs it as much as many bytes.
        if self._taken >= WINDOW // 4 and not self.ended:
            size, self._taken = self._taken, 0
            self._under_way -= size
            await self._send(encode(b"W", self.channel, size.to_bytes(4, "big")))
        return data

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.what, subject=self._machine, hint=self._failure.hint) from self._failure
