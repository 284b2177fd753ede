"""Requests of clients that are not trusted, over a stream in memory."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from offloadd.daemon.small_http import MAX_BODY, MAX_HEAD, BadRequestError, SmallHttp, SmallRequest

POST = b"POST /v1/offload?x=y HTTP/1.0\r\nHost: o\r\nContent-Length: 5\r\n\r\nhello"


class Said(trio.abc.Stream):
    """The pieces that a client sends, one after the other, and then the end."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._pieces:
            return b""
        piece = self._pieces.pop(0)
        assert max_bytes
        if rest := piece[max_bytes:]:
            self._pieces.insert(0, rest)
        return piece[:max_bytes]

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise AssertionError("nothing is answered before it is asked")

    async def wait_send_all_might_not_block(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


async def receive(*pieces: bytes) -> SmallRequest:
    return await SmallHttp(Said(*pieces)).receive()


async def test_a_request_comes_in_any_pieces() -> None:
    whole = SmallRequest("POST", "/v1/offload", b"hello")
    assert await receive(POST) == whole
    assert await receive(*(bytes([byte]) for byte in POST)) == whole
    assert await receive(POST + b"GET /v1/status HTTP/1.0\r\n\r\n") == whole


@pytest.mark.parametrize(
    "data",
    [
        b"",
        POST[:-1],
        b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * MAX_HEAD,
        b"POST / HTTP/1.1\r\nHost: o\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: o\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1) + bytes(MAX_BODY + 1),
        b"\x16\x03\x01\x02\x00\r\n\r\n",
    ],
)
async def test_what_is_none(data: bytes) -> None:
    with pytest.raises(BadRequestError):
        await receive(data)


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_whatever_comes_it_is_a_request_or_is_refused(pieces: list[bytes]) -> None:
    async def run() -> None:
        with suppress(BadRequestError):
            await receive(b"GET /", *pieces)

    trio.run(run)
