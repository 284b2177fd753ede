"""A strict reader for tars that come from somebody whom we do not trust, and the headers of those that we write.

The standard library's reader takes an extended header of any size into memory and knows ways to store files (sparse,
multi-volume) that none of our peers uses.  This one reads ustar and pax (POSIX.1-2001, pax, "ustar Interchange Format" and "pax
Interchange Format"), GNU tar's long names (types L and K) and numbers, refuses everything else, and keeps one block in memory
beside the extended headers of one member, which are bounded.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

BLOCK = 512
PIECE = 64 * 1024
END = bytes(2 * BLOCK)
"""The two empty blocks after the last member."""
MAX_EXTENDED = 1 << 20
"""Bytes of all extended headers of one member."""
MAX_NAME = 4095
"""Linux's PATH_MAX without the final zero byte."""


MAX_FILE = 1 << 50
"""Bytes; more than any disk holds, and an offset that a file can be read at."""


class TarError(ValueError):
    """The tar is damaged, or has something in it that is not taken."""


class Kind(Enum):
    FILE = tarfile.REGTYPE
    HARD_LINK = tarfile.LNKTYPE
    SYMLINK = tarfile.SYMTYPE
    DIRECTORY = tarfile.DIRTYPE


@dataclass(frozen=True, kw_only=True)
class Member:
    """One member; names are decoded as file names are, undecodable bytes as surrogates."""

    name: str
    """Relative, without `.`, `..` or empty components."""
    kind: Kind
    mode: int
    """Permission bits, with setuid, setgid and sticky if they are set."""
    size: int
    """Bytes of content; 0 for anything but a file."""
    mtime: int
    """Whole seconds since 1970, not negative."""
    link: str = ""
    """Where a symlink points to; for a hard link the name of an earlier member."""

    def header(self) -> bytes:
        """The blocks before the content.  Owner is 1000:1000, the user whom builds run as in every guest."""
        info = tarfile.TarInfo(self.name)
        info.type, info.linkname, info.mode = self.kind.value, self.link, self.mode
        info.size, info.mtime, info.uid, info.gid = self.size, self.mtime, 1000, 1000
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What follows `size` bytes of content."""
    return bytes(-size % BLOCK)


class TarReader:
    """Iterates over the members of `file`; between two of them `content` gives the bytes of the last one."""

    def __init__(self, file: BinaryIO, *, max_members: int = 1_000_000) -> None:
        self._file = file
        self._max_members = max_members
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        """Raises TarError for everything that is not exactly a tar of names inside one directory."""
        count = 0
        while (member := self._next()) is not None:
            count += 1
            if count > self._max_members:
                raise TarError(f"more than {self._max_members} members")
            if member.name:
                self._left, self._padding = member.size, -member.size % BLOCK
                yield member
                self._skip()

    def content(self) -> Iterator[bytes]:
        """The content of the member that was yielded last, in pieces."""
        while self._left:
            piece = self._file.read(min(self._left, PIECE))
            if not piece:
                raise TarError("cut off in the middle of a file")
            self._left -= len(piece)
            yield piece

    def _skip(self) -> None:
        if self._file.seekable():
            # Beyond the end this succeeds too: then the next header is missing.
            self._file.seek(self._left + self._padding, 1)
            self._left = 0
            return
        for _ in self.content():
            pass
        self._exactly(self._padding)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._file.read(size - len(data))
            if not piece:
                raise TarError("cut off: its end is missing")
            data += piece
        return data

    def _next(self) -> Member | None:
        """The next member, None at the end; its name is empty when it is the top directory itself."""
        records: dict[bytes, bytes] = {}
        extended = 0
        while True:
            block = self._exactly(BLOCK)
            if not block.strip(b"\0"):
                return None
            if _number(block[148:156]) != sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
                raise TarError("a header's checksum is wrong")
            kind, size = block[156:157], _number(block[124:136])
            if kind not in (b"x", b"g", b"L", b"K"):
                return _member(block, records)
            extended += BLOCK + size
            if size < 0 or extended > MAX_EXTENDED:
                raise TarError(f"extended headers of {extended} bytes")
            data = self._exactly(size + -size % BLOCK)[:size]
            if kind == b"x":
                records |= _pax_records(data)
            elif kind in (b"L", b"K"):
                records[b"path" if kind == b"L" else b"linkpath"] = data.rstrip(b"\0")


def _number(field: bytes) -> int:
    """Octal digits or, when the first bit is set, a 256-based number (GNU tar)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True)
        return value + (1 << (8 * len(field) - 1)) if value < 0 and field[0] == 0x80 else value
    try:
        text = field.split(b"\0")[0].decode("ascii").strip(" ")
    except UnicodeDecodeError as exc:
        raise TarError("a header has something else than a number in a number's place") from exc
    if text.strip("01234567"):
        raise TarError("a header has something else than a number in a number's place")
    return int(text or "0", 8)


_RECORDS = frozenset({b"path", b"linkpath", b"size", b"mtime"})


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Of the records `LENGTH KEY=VALUE newline` those that say something to us."""
    records = {}
    at = 0
    while at < len(data):
        digits, _, _ = data[at : at + 20].partition(b" ")
        end = at + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise TarError("an extended header is damaged")
        if key.startswith(b"GNU.sparse"):
            raise TarError("a sparse file")
        if key in _RECORDS:
            records[key] = value
        at = end
    return records


def _member(block: bytes, records: dict[bytes, bytes]) -> Member:
    kind_byte = block[156:157].replace(b"\0", b"0")
    try:
        kind = Kind(kind_byte)
    except ValueError:
        raise TarError(f"a member of type {kind_byte!r}: only files, directories and links are taken") from None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    name = records.get(b"path", name)
    link = records.get(b"linkpath", block[157:257].partition(b"\0")[0])
    size = _pax_number(records, b"size", _number(block[124:136]))
    if kind is Kind.HARD_LINK:
        link = _clean(link).encode("utf-8", "surrogateescape")
    elif kind is Kind.SYMLINK and (not link or b"\0" in link or len(link) > MAX_NAME):
        raise TarError("a link to nothing")
    return Member(
        name=_clean(name),
        kind=kind,
        mode=_number(block[100:108]) & 0o7777,
        size=size if kind is Kind.FILE else 0,
        # Half of what a 64-bit time holds: nobody can mean more, and no file system takes it.
        mtime=min(max(_pax_number(records, b"mtime", _number(block[136:148])), 0), 1 << 33),
        link=link.decode("utf-8", "surrogateescape") if kind in (Kind.SYMLINK, Kind.HARD_LINK) else "",
    )


def _pax_number(records: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    """A number of an extended header without its fraction; never below zero but for a time before 1970."""
    text = records.get(key)
    value = otherwise
    if text is not None:
        digits = text.partition(b".")[0]
        if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:
            raise TarError(f"an extended header says {key.decode()} {text[:40]!r}")
        value = int(digits)
    if key == b"size" and not 0 <= value <= MAX_FILE:
        raise TarError(f"a file of {value} bytes")
    return value


def _clean(name: bytes) -> str:
    """The name without `.` and empty components; refused when it is absolute or has `..` in it."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts or b"\0" in name or len(name) > MAX_NAME:
        shown = name[:200].decode("utf-8", "backslashreplace")
        raise TarError(f"the name {shown!r} leads out of the directory")
    return b"/".join(parts).decode("utf-8", "surrogateescape")
