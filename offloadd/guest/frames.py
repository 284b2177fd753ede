"""The frames that a build is spoken in, between the host and the guest's build service (`images/guest/build-service`).

    frame = kind (1 byte) + length (4 bytes, big-endian) + payload

    host -> guest   B begin (JSON)   S a piece of the source's tar   s its end
    guest -> host   E event (JSON)   L log   O a piece of the outputs' tar   o its end   D done, the last frame

The guest is hostile: `Decoder` refuses what does not keep to this before it keeps any of it in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from offloadd.errors import ProtocolError

MAX_PAYLOAD = 1 << 20
PIECE = 64 * 1024
"""The usual size in bytes of a piece of a stream."""

HOST_KINDS = frozenset({b"B", b"S", b"s"})
GUEST_KINDS = frozenset({b"E", b"L", b"O", b"o", b"D"})
_EMPTY_KINDS = frozenset({b"s", b"o", b"D"})
_LAST_KIND = b"D"
_HEAD = 5


@dataclass(frozen=True)
class Frame:
    """One frame; `kind` is one byte."""

    kind: bytes
    payload: bytes = b""

    def json(self) -> dict[str, Any]:
        """The payload as a JSON object; ProtocolError when it is none."""
        return read_object(self.payload, f"the guest sent a frame {self.kind!r}")


def read_object(payload: bytes, sent: str) -> dict[str, Any]:
    """A guest's JSON object.

    Args:
        sent: who sent what, for errors: `the guest sent a frame b'E'`.
    Raises:
        ProtocolError: it is none.
    """
    try:
        value = json.loads(payload.decode("utf-8"))
        # Half a surrogate pair ("\\ud800") is JSON, but no text that could be stored or shown again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"{sent} that is not JSON") from exc
    if not isinstance(value, dict):
        raise ProtocolError(f"{sent} that is not a JSON object")
    return value


def encode(kind: bytes, payload: bytes = b"") -> bytes:
    """The frame as bytes.

    Raises:
        ValueError: there is no such kind, or the payload is longer than a frame may be.
    """
    if kind not in HOST_KINDS | GUEST_KINDS:
        raise ValueError(f"no frame is of kind {kind!r}")
    if len(payload) > MAX_PAYLOAD or (payload and kind in _EMPTY_KINDS):
        raise ValueError(f"{len(payload)} bytes are too many for a frame {kind!r}")
    return kind + len(payload).to_bytes(4, "big") + payload


class Decoder:
    """Cuts a guest's bytes, in whatever pieces they come, into frames."""

    def __init__(self, kinds: frozenset[bytes] = GUEST_KINDS) -> None:
        self._kinds = kinds
        self._waiting = bytearray()
        self._ended = False

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            ProtocolError: a kind that the peer must not send, a payload over the limit, or anything after the last frame.
        """
        self._waiting += data
        frames = []
        while (size := self._next_size()) is not None and len(self._waiting) >= _HEAD + size:
            frames.append(Frame(bytes(self._waiting[:1]), bytes(self._waiting[_HEAD : _HEAD + size])))
            del self._waiting[: _HEAD + size]
            self._ended = frames[-1].kind == _LAST_KIND
        return frames

    def end(self) -> None:
        """Say that the peer has closed; ProtocolError when that was within a frame."""
        if self._waiting:
            raise ProtocolError("the guest closed its channel in the middle of a frame")

    def _next_size(self) -> int | None:
        """The length of the next frame's payload, checked; None when its head is not there yet."""
        if not self._waiting:
            return None
        kind = bytes(self._waiting[:1])
        if self._ended:
            raise ProtocolError("the guest sent something after its last frame")
        if kind not in self._kinds:
            raise ProtocolError(f"the guest sent a frame of unknown kind {kind!r}")
        if len(self._waiting) < _HEAD:
            return None
        size = int.from_bytes(self._waiting[1:_HEAD], "big")
        if size > (0 if kind in _EMPTY_KINDS else MAX_PAYLOAD):
            raise ProtocolError(f"the guest sent a frame {kind!r} of {size} bytes")
        return size
