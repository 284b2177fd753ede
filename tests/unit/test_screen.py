"""Pictures of screens: what QEMU may write, and what we make of it; and who may look."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import cast

import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from offload_cli.relay import find_owner
from offloadd.errors import ProtocolError
from offloadd.vm import screen
from offloadd.vm.qmp import Qmp
from offloadd.vm.screen import PNG, _open_memory, _read_png, png


def decode(picture: bytes) -> tuple[int, int, bytes]:
    """A reader of these PNGs that knows nothing of the writer."""
    assert picture.startswith(PNG)
    chunks, at = {}, len(PNG)
    while at < len(picture):
        size, kind = struct.unpack(">I4s", picture[at : at + 8])
        content = picture[at + 8 : at + 8 + size]
        assert struct.unpack(">I", picture[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *how = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert how == [8, 2, 0, 0, 0]
    rows, step = zlib.decompress(chunks[b"IDAT"]), 3 * width + 1
    assert len(rows) == step * height
    assert {rows[step * y] for y in range(height)} == {0}
    return width, height, b"".join(rows[step * y + 1 : step * (y + 1)] for y in range(height))


@given(st.integers(1, 20), st.integers(1, 20), st.randoms(use_true_random=False))
def test_a_png_has_the_same_pixels(width: int, height: int, random: Random) -> None:
    pixels = random.randbytes(3 * width * height)
    assert decode(png(width, height, pixels)) == (width, height, pixels)


def written(content: bytes) -> bytes:
    with _open_memory("m") as (picture, writable):
        os.write(writable, content)
        return _read_png(picture, "m")


def test_what_qemu_writes() -> None:
    assert decode(written(b"P6\n2 1\n255\nabcdef")) == (2, 1, b"abcdef")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P6\n2 1\n255\nabcde",
        b"P6\n2 1\n255\nabcdefg",
        b"P6\n0 0\n255\n",
        b"P6\n2 1\n65535\nabcdef",
        b"P5\n2 1\n255\nab",
        b"P6\n99999 99999\n255\nab",
        b"P6\n-2 1\n255\nabcdef",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_what_a_qemu_that_is_not_ours_any_more_writes(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="no picture"):
        written(content)


TABLE = """\
   0: 0100007F:170C 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:D431 0100007F:170C 01 00000000:00000000 00:00000000 00000000  1000        0 2 1 0 20 4 30 10 -1
   2: 0100007F:170C 0100007F:D431 01 00000000:00000000 00:00000000 00000000     7        0 3 1 0 20 4 30 10 -1
   3: 0100007F:D432 0100007F:170C 06 00000000:00000000 03:000017B0 00000000     0        0 0 3 0
""".splitlines()


def test_whose_connection_it_is() -> None:
    ours = ("127.0.0.1", 0x170C)
    if sys.byteorder == "big":
        pytest.skip("the table is one of a little-endian kernel")
    assert find_owner(TABLE, ("127.0.0.1", 0xD431), ours) == 1000
    # Closed by them already: the kernel has forgotten whose it was, and says 0.
    assert find_owner(TABLE, ("127.0.0.1", 0xD432), ours) is None
    assert find_owner(TABLE, ("127.0.0.1", 1), ours) is None
    assert find_owner(TABLE, ("127.0.0.2", 0xD431), ours) is None


class Listener:
    """Each viewer but the first is there when it is accepted."""

    def __init__(self) -> None:
        self.accepted = 0

    async def accept(self) -> tuple[socket.socket, str]:
        self.accepted += 1
        if self.accepted == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        if self.accepted == 2:
            return socket.socket(socket.AF_UNIX), ""
        await trio.sleep_forever()
        raise AssertionError


async def test_a_viewer_that_cannot_be_accepted_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    listener, told = Listener(), list[str]()

    class OfQemu:
        instance = "m"

        async def give(self, fd: int, name: str) -> None: ...

        async def execute(self, command: str, **arguments: object) -> None:
            told.append(command)

    monkeypatch.setattr(screen, "_listener", lambda path, instance: nullcontext(listener))
    with trio.move_on_after(60):
        await screen.serve_screen(cast(Qmp, OfQemu()), Path("/vnc.sock"))
    assert told == ["add_client"]
