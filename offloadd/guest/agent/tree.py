"""Trees of files into a guest and out of it, through the guest's own `tar`."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

import trio

from offloadd.errors import AgentError
from offloadd.guest.agent.process import AgentProcess
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.console import clean

# A record as large as a frame: each is a call of the system, which costs under emulation.  The guest's clock is a build's, and
# nobody needs to be told of every file that is younger.
PACK = ("/bin/tar", "--create", "--blocking-factor=128", "--numeric-owner", "--hard-dereference")
UNPACK = ("/bin/tar", "--extract", "--blocking-factor=128", "--numeric-owner", "--warning=no-timestamp")
_MAX_WORDS = 4096


class _LastWords:
    """The end of what a program says on standard error."""

    def __init__(self, process: AgentProcess) -> None:
        self._process = process
        self._text = b""
        self._complete = trio.Event()

    async def keep(self) -> None:
        while piece := await self._process.receive_error():
            self._text = (self._text + piece)[-_MAX_WORDS:]
        self._complete.set()

    async def check(self, what: str) -> None:
        """Wait for the program's end; AgentError when it failed."""
        status = await self._process.wait()
        await self._complete.wait()
        if status:
            detail = clean(self._text.decode(errors="replace"))
            raise AgentError(f"{what}: tar ended with status {status}", detail=detail)


async def unpack(process: AgentProcess, pieces: AsyncIterable[bytes]) -> None:
    """Feed a `tar` that unpacks; AgentError when it fails."""
    words = _LastWords(process)
    async with open_narrow_nursery() as nursery:
        nursery.start_soon(words.keep)
        async for piece in pieces:
            try:
                await process.send(piece)
            except AgentError:
                # It has ended too early: it has said why.
                break
        await process.send_eof()
        await words.check("a tree cannot be put into the guest")


@asynccontextmanager
async def packed(process: AgentProcess) -> AsyncIterator[AsyncIterator[bytes]]:
    """What a `tar` that packs says, in pieces; AgentError behind the last one when it failed."""
    words = _LastWords(process)

    async def pieces() -> AsyncIterator[bytes]:
        while piece := await process.receive():
            yield piece
        await words.check("a tree cannot be taken from the guest")

    async with open_narrow_nursery() as nursery:
        nursery.start_soon(words.keep)
        yield pieces()
        nursery.cancel_scope.cancel()
