"""A build service that says what a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import trio

from offloadd.errors import TransientError


class FakeProcess:
    """A `Channel`.  A script of bytes to send, seconds to wait, and b"" for the end; without one it stays silent."""

    def __init__(self, script: list[bytes | float], errors: bytes, send_error: TransientError | None) -> None:
        self.sent = b""
        self._script = script
        self._errors = [errors, b""] if errors else [b""]
        self._send_error = send_error

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self._send_error:
            raise self._send_error
        self.sent += data

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while self._script and isinstance(self._script[0], float):
            await trio.sleep(self._script.pop(0))  # type: ignore[arg-type]
        if not self._script:
            await trio.sleep_forever()
        return cast("bytes", self._script.pop(0))

    async def receive_error(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._errors.pop(0)


class FakeGuest:
    def __init__(self, *script: bytes | float, errors: bytes = b"", send_error: TransientError | None = None) -> None:
        self.process = FakeProcess(list(script), errors, send_error)
        self.closed = False

    @asynccontextmanager
    async def open_process(self) -> AsyncIterator[FakeProcess]:
        try:
            yield self.process
        finally:
            self.closed = True
