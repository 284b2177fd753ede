"""The frames of the agent's protocol, version 1; `docs/agent.md` says what they mean.

    frame = kind (1 byte) + channel (4 bytes, big-endian) + length (4 bytes, big-endian) + payload (at most 64 KiB)

    host -> guest   H hello   R run   I input   i its end   K signal   W window   X close   C call
    guest -> host   h hello   O output   E error output   x exit   W window   A answer

The guest is hostile: `Decoder` refuses what does not keep to this before it keeps any of it in memory.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from offloadd.errors import AgentError, ProtocolError
from offloadd.guest.frames import read_object

VERSION = 1
MAX_PAYLOAD = 64 * 1024
WINDOW = 256 * 1024
"""Bytes that may be under way on a channel, each way, before the other side says that it has taken some."""
HEAD = 9
MAX_SKIPPED = 1 << 20
"""Of what an earlier connection may have left on the way, in front of the answer to our hello."""

_GUEST_KINDS = b"hOExWA"
_NAME = b"offload-agent "
_MAX_CONTROL = 16 * 1024
_LONGEST_VERSION = 20


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; `kind` is one byte."""

    kind: bytes
    channel: int
    payload: bytes = b""

    def number(self) -> int:
        """The payload of a window."""
        return int.from_bytes(self.payload, "big")

    def json(self) -> dict[str, Any]:
        """The payload as a JSON object; ProtocolError when it is none."""
        return read_object(self.payload, f"the agent sent a frame {self.kind!r}")


def encode(kind: bytes, channel: int, payload: bytes | memoryview = b"") -> bytes:
    """The frame as bytes; ValueError when the payload is too long."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(payload)} bytes are too many for a frame")
    return b"".join((kind, channel.to_bytes(4, "big"), len(payload).to_bytes(4, "big"), payload))


class Hello:
    """One session's hello, and the search for its answer."""

    def __init__(self) -> None:
        self._session = secrets.token_hex(16).encode()
        self._waiting = b""
        self._skipped = 0

    def question(self, *, after_loss: bool) -> bytes:
        """What is sent.

        Args:
            after_loss: an earlier host may have been cut off in the middle of a frame: it is filled up, so that this is not
                taken for the rest of it.
        """
        hello = encode(b"H", 0, _NAME + b"%d " % VERSION + self._session)
        return bytes(HEAD + MAX_PAYLOAD) + hello if after_loss else hello

    def search(self, data: bytes) -> bytes | None:
        """None: not answered yet; else what came behind the answer.

        Raises:
            ProtocolError: the agent speaks another version, or says too much that is no answer.
        """
        self._waiting += data
        end = self._waiting.find(b" " + self._session)
        if end >= 0:
            version = self._waiting[:end].rpartition(_NAME)[2]
            if version != b"%d" % VERSION:
                shown = version[-_LONGEST_VERSION:].decode(errors="replace")
                raise ProtocolError(
                    f"the agent speaks version {shown!r}, this host {VERSION}", hint="offload image build --rebuild"
                )
            return self._waiting[end + 1 + len(self._session) :]
        kept = self._waiting[-(HEAD + len(_NAME) + _LONGEST_VERSION + 1 + len(self._session)) :]
        self._skipped += len(self._waiting) - len(kept)
        self._waiting = kept
        if self._skipped > MAX_SKIPPED:
            raise ProtocolError("the agent does not answer: it says other things")
        return None


class Decoder:
    """Cuts a guest's bytes, in whatever pieces they come, into frames."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            ProtocolError: a kind that the guest must not send, or a payload that is too long, or too short for its kind.
            AgentError: the agent was started again.
        """
        self._waiting += data
        frames: list[Frame] = []
        at = 0
        with memoryview(self._waiting) as waiting:
            while len(waiting) - at >= HEAD:
                kind = bytes(waiting[at : at + 1])
                size = _check_head(kind, int.from_bytes(waiting[at + 5 : at + HEAD], "big"))
                end = at + HEAD + size
                if len(waiting) < end:
                    break
                channel = int.from_bytes(waiting[at + 1 : at + 5], "big")
                frames.append(Frame(kind, channel, bytes(waiting[at + HEAD : end])))
                at = end
        del self._waiting[:at]
        return frames


def _check_head(kind: bytes, size: int) -> int:
    if kind in (b"\0", b"h"):
        # A new agent fills up the frame that its predecessor may have begun, and says hello.
        raise AgentError("the agent ended, and was started again")
    if kind not in _GUEST_KINDS:
        raise ProtocolError(f"the agent sent a frame of unknown kind {kind!r}")
    least, most = {b"O": (1, MAX_PAYLOAD), b"E": (1, MAX_PAYLOAD), b"W": (4, 4)}.get(kind, (0, _MAX_CONTROL))
    # An empty piece of output would be for nothing, as often as somebody likes.
    if not least <= size <= most:
        raise ProtocolError(f"the agent sent a frame {kind!r} of {size} bytes")
    return size
