"""Guests that keep us waiting for their hello, or for their thirst."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from offloadd.errors import BootError
from offloadd.guest.secret_service import HELLO, SecretLimits, deliver_secrets
from tests.secret_header import decode_header

LIMIT_S = 30.0
SHORT = SecretLimits(retries=0, handshake_timeout_s=0.6, send_s=0.6)
Handler = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root/etc/ssh/authorized_keys.d"
    folder.mkdir(parents=True)
    (folder / "offloading").write_text("ssh-ed25519 AAAA\n")
    (folder / "root").write_text("ssh-ed25519 BBBB\n")
    return tmp_path / "root"


@asynccontextmanager
async def guest(handler: Handler) -> AsyncIterator[int]:
    """The port of a guest that does this with each connection."""

    async def survive(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await handler(stream)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, survive, host="127.0.0.1"), 0)
        with trio.fail_after(LIMIT_S):
            yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def trickling(stream: trio.SocketStream) -> None:
    for byte in HELLO[:-1]:
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.1)
    await trio.sleep_forever()


async def dropping(stream: trio.SocketStream) -> None:
    await stream.aclose()


@pytest.mark.parametrize("handler", [silent, trickling, dropping])
async def test_a_guest_without_a_whole_hello(handler: Handler, root: Path) -> None:
    async with guest(handler) as port:
        with pytest.raises(BootError, match=r"m: its secret service gave no hello within 1 s"):
            await deliver_secrets(port, root, machine="m", limits=SHORT)


async def test_a_guest_that_does_not_read(root: Path) -> None:
    # More than the buffers of both ends hold.
    (root / "large").write_bytes(bytes(32 * 1024**2))

    async def thirstless(stream: trio.SocketStream) -> None:
        await stream.send_all(HELLO)
        await trio.sleep_forever()

    async with guest(thirstless) as port:
        with pytest.raises(BootError, match=r"did not take its secrets within 1 s"):
            await deliver_secrets(port, root, machine="m", limits=SHORT)


@pytest.mark.parametrize("retries", [0, 1])
async def test_nobody_listens(root: Path, retries: int, autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(BootError, match=rf"refused {retries + 1} connections"):
            await deliver_secrets(reserved.getsockname()[1], root, machine="m", limits=SecretLimits(retries=retries))


async def test_a_guest_that_listens_late(root: Path) -> None:
    """It is refused, and comes a second later."""
    got: list[bytes] = []

    async def take(stream: trio.SocketStream) -> None:
        await stream.send_all(HELLO)
        got.append(b"".join([piece async for piece in stream]))

    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        heard: list[None] = []
        withheld = ("/etc/ssh/authorized_keys.d/offloading",)
        deliver = partial(deliver_secrets, machine="m", withheld=withheld, heard=lambda: heard.append(None))
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deliver, port, root)
                await trio.sleep(0.2)
                reserved.listen()
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(reserved.dup()))
                await take(await listener.accept())
                await listener.aclose()
    header, _, content = got[0].partition(b"ssh-ed25519")
    assert [name for name, _, _ in decode_header(header)] == ["/etc/ssh/authorized_keys.d/root"]
    assert content == b" BBBB\n"
    assert heard == [None]


async def test_a_guest_that_breaks_off_each_time(root: Path) -> None:
    async def fickle(stream: trio.SocketStream) -> None:
        await stream.send_all(HELLO)
        # What is not read yet makes the kernel reset the connection.
        await stream.receive_some(1)
        await stream.aclose()

    (root / "large").write_bytes(bytes(32 * 1024**2))
    async with guest(fickle) as port:
        with pytest.raises(BootError, match=r"did not take its secrets within 1 s"):
            await deliver_secrets(port, root, machine="m", limits=SHORT)
