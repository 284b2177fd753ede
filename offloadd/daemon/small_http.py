"""HTTP for clients that are not trusted: one small request on a connection, one answer, and no more."""

from __future__ import annotations

from dataclasses import dataclass

import h11
import trio

MAX_HEAD = 16 * 1024
MAX_BODY = 256 * 1024
PIECE = 16 * 1024


class BadRequestError(Exception):
    """What came is no such request."""


@dataclass(frozen=True)
class SmallRequest:
    method: str
    path: str
    """Without its query, which nobody needs."""
    body: bytes


class SmallHttp:
    """One connection.  How long it takes is limited by who calls."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)

    async def receive(self) -> SmallRequest:
        """Wait for the request.

        Raises:
            BadRequestError: it is not whole, too large, or no HTTP.
            trio.BrokenResourceError: the client has gone.
        """
        head, body = None, bytearray()
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Request):
                head = event
                if any(name == b"transfer-encoding" for name, _ in event.headers):
                    raise BadRequestError  # a chunk of one byte costs as much as a large one
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_BODY:
                    raise BadRequestError
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                target = head.target.decode("ascii", "replace")
                return SmallRequest(head.method.decode("ascii", "replace"), target.partition("?")[0], bytes(body))
            else:  # it has ended
                raise BadRequestError

    async def _next_event(self) -> object:
        try:
            while (event := self._connection.next_event()) is h11.NEED_DATA:
                self._connection.receive_data(bytes(await self._stream.receive_some(PIECE)))
        except h11.RemoteProtocolError as exc:
            raise BadRequestError from exc
        return event

    async def send(self, status: int, kind: str = "text/plain", body: bytes = b"") -> None:
        """Send the answer, whole."""
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
        data = self._connection.send(h11.Response(status_code=status, headers=headers)) or b""
        if body:
            data += self._connection.send(h11.Data(data=body)) or b""
        await self._stream.send_all(data)

    async def wait_closed(self) -> None:
        """Wait until the client has gone, or says what it should not: whatever is pending, there is no second request."""
        await self._stream.receive_some(1)
