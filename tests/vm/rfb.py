"""As much of VNC's protocol (RFC 6143) as it takes to press keys."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path

_CONTROL, _ALT, _DELETE = 0xFFE3, 0xFFE9, 0xFFFF
"""X11's keysyms."""


def press_ctrl_alt_del(path: Path) -> None:
    """Press the keys that have a PC's system start again, at the VNC server on the Unix socket `path`."""
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(30)
        server.connect(str(path))
        stream = server.makefile("rwb", buffering=0)
        assert _read(stream.read, 12) == b"RFB 003.008\n"
        stream.write(b"RFB 003.008\n")
        kinds = _read(stream.read, _read(stream.read, 1)[0])
        assert 1 in kinds, "without a password"
        stream.write(b"\x01")
        assert _read(stream.read, 4) == bytes(4)
        stream.write(b"\x01")
        [name] = struct.unpack(">20xI", _read(stream.read, 24))
        _read(stream.read, name)
        for pressed in (True, False):
            for key in (_CONTROL, _ALT, _DELETE):
                stream.write(struct.pack(">BBxxI", 4, pressed, key))
        # The server reads what came before the end of the stream.
        server.shutdown(socket.SHUT_WR)
        while stream.read(65536):
            pass


def _read(read: Callable[[int], bytes | None], size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = read(size - len(data))
        assert piece, "the server went away"
        data += piece
    return data
