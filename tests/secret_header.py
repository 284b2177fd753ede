"""The header of the secrets, read back: in the product only guests do that."""

from __future__ import annotations

import re

from offloadd.errors import ProtocolError

_UNESCAPED = {"n": "\n", "t": "\t", "r": "\r"}
_HEADER = re.compile(r"\(secrets \(version 0\) \(files \((.*)\)\)\)", re.DOTALL)
_ENTRY = re.compile(r'\("((?:[^"\\]|\\.)*)" ([0-9]{1,15}) ([0-9]{1,15})\) ?', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)


def decode_header(header: bytes) -> list[tuple[str, int, int]]:
    """(name, size, mode) of each file of a header as `encode_header` writes it; ProtocolError when it is none."""
    try:
        found = _HEADER.fullmatch(header.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise ProtocolError("the header of the secrets is not UTF-8") from exc
    files, at = [], 0
    entries = found[1] if found else ""
    while entry := _ENTRY.match(entries, at):
        files.append((_ESCAPE.sub(_unescape, entry[1]), int(entry[2]), int(entry[3])))
        at = entry.end()
    if found is None or at < len(entries):
        raise ProtocolError("the header of the secrets is not understood")
    return files


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else _UNESCAPED.get(match[2], match[2])
