"""A guest's screen: viewers of it, and what it shows now.

QEMU opens nothing of ours and listens nowhere: a viewer connects to a socket of ours, and that connection is given to QEMU.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import trio

from offloadd.errors import HostError, MachineLostError, NotFoundError, ProtocolError
from offloadd.vm.qmp import Qmp

PNG = b"\x89PNG\r\n\x1a\n"

_PPM = re.compile(rb"P6\n([0-9]{1,5}) ([0-9]{1,5})\n255\n")
_MAX_PPM = 64 * 1024**2
"""Bytes; of the largest mode of QEMU's standard VGA, 2560 x 1600, there are 12 MB."""
_NO_SCREEN = "no console"
"""QEMU 4.2 to 10: There is no console to take a screendump from."""
_PAUSE_S = 0.5


async def serve_screen(qmp: Qmp, path: Path) -> None:
    """Listen at `path` and give each viewer that connects to QEMU, until cancelled; QEMU speaks VNC with it.

    An earlier daemon's socket at `path` is replaced; viewers that it let in stay.
    Raises:
        HostError: the socket cannot be made.
    """
    with _listener(path, qmp.instance) as listener:
        for number in count():
            try:
                viewer, _ = await listener.accept()
            except OSError:
                # That viewer gave up, or we have no descriptor left just now: the machine goes on.
                await trio.sleep(_PAUSE_S)
                continue
            # A QEMU that goes away is seen by others; one that refuses this viewer may take the next.
            with viewer, suppress(MachineLostError):
                name = f"viewer{number}"
                await qmp.give(viewer.fileno(), name)
                # Nobody but us reaches the socket: there is nothing more to be asked for.
                await qmp.execute("add_client", protocol="vnc", fdname=name, skipauth=True)


@contextmanager
def _listener(path: Path, instance: str) -> Iterator[trio.socket.SocketType]:
    with trio.socket.socket(socket.AF_UNIX) as listener:
        try:
            path.unlink(missing_ok=True)
            with socket.socket(fileno=os.dup(listener.fileno())) as plain:
                # trio's own is async, for the sake of names.
                plain.bind(str(path))
            path.chmod(0o600)
        except OSError as exc:
            raise HostError(f"cannot make {path}: {exc}", subject=instance) from exc
        listener.listen(5)
        yield listener


async def take_screenshot(qmp: Qmp) -> bytes:
    """What the guest's screen shows now, as PNG.

    QEMU writes a PPM, which every version of it can and whose every byte is checked here; the PNG is made by us, so that
    nobody's decoder meets what a broken-out guest may have written.

    Raises:
        NotFoundError: it has no screen.
        MachineLostError: QEMU went away or refused.
        ProtocolError: QEMU wrote no picture.
    """
    with _open_memory(qmp.instance) as (picture, writable):
        async with qmp.handed_over(writable) as name:
            try:
                await qmp.execute("screendump", filename=name)
            except MachineLostError as exc:
                if _NO_SCREEN in exc.what:
                    raise NotFoundError("has no screen", subject=qmp.instance, hint="its console is text") from exc
                raise
        return await trio.to_thread.run_sync(_read_png, picture, qmp.instance)


@contextmanager
def _open_memory(instance: str) -> Iterator[tuple[int, int]]:
    """A file in memory, to read, and a second descriptor of it, to write.

    One that breaks out of QEMU can fill it, as it can fill QEMU's own memory: on that one's account, and gone with it.
    """
    with ExitStack() as stack:
        try:
            picture = os.memfd_create("screen", os.MFD_CLOEXEC)
            stack.callback(os.close, picture)
            # QEMU takes a descriptor for writing only when it can do nothing else.
            writable = os.open(f"/proc/self/fd/{picture}", os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, writable)
        except OSError as exc:
            raise HostError(f"cannot keep a picture of its screen: {exc.strerror}", subject=instance) from exc
        yield picture, writable


def _read_png(picture: int, instance: str) -> bytes:
    content = os.pread(picture, _MAX_PPM + 1, 0)
    found = _PPM.match(content)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if found is None or not width * height or len(content) != found.end() + 3 * width * height:
        raise ProtocolError("QEMU wrote no picture of its screen", subject=instance)
    return png(width, height, content[found.end() :])


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG of 24 bits (https://www.w3.org/TR/png-3/) of rows from the top, each pixel red, green, blue."""
    row = 3 * width
    rows = b"".join(b"\0" + pixels[row * y : row * (y + 1)] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
