"""What archives say of the time and content of their files, without unpacking them: tar (plain, gzip, bzip2, xz) and zip.

Archives may come from anybody: memory is bounded, and so is what is decompressed.
Sources: POSIX.1-2001, pax; PKWARE's APPNOTE, 4.3.12 and 4.3.16, for zip's central directory.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, BinaryIO, cast

from offloadd.builder.tar import TarError, TarReader

MAX_UNPACKED_BYTES = 16 * 1024**3
_XZ_MEMORY = 256 * 1024**2
"""Bytes; `xz -9` needs 65 MiB."""
_PIECE = 64 * 1024
BROKEN = (TarError, OSError, EOFError, lzma.LZMAError, zlib.error, struct.error)
"""What a damaged archive raises."""
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz", ".tar.lzma")
ZIPS = (".zip", ".whl")

_ZIP_END = b"PK\x05\x06"
_ZIP_ENTRY = struct.Struct("<4s8xHH12xHHH12x")
"""Of a central directory's entry: signature, time, date, and the lengths of what follows the fixed 46 bytes."""


def file_times(path: Path) -> Iterator[datetime]:
    """The times (in UTC) of the files in the archive `path`, up to where it is damaged; none when it is no archive.  Blocks."""
    try:
        if path.name.endswith(ZIPS):
            yield from _zip_times(path)
        elif path.name.endswith(TARS):
            with _open_tar(path) as tar:
                for member in tar:
                    yield datetime.fromtimestamp(member.mtime, UTC)
    except BROKEN:
        return


def read_member(path: Path, wanted: Callable[[str], bool], limit: int) -> bytes | None:
    """The first `limit` bytes of the first file in the tar `path` whose name is wanted, None when there is none.  Blocks."""
    try:
        with _open_tar(path) as tar:
            for member in tar:
                if wanted(member.name) and member.size:
                    content = b""
                    for piece in tar.content():
                        content += piece
                        if len(content) >= limit:
                            break
                    return content[:limit]
    except BROKEN:
        pass
    return None


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file `path` as a stream, decompressed by what its name says; it ends with OSError beyond MAX_UNPACKED_BYTES."""
    with path.open("rb") as file:
        yield cast(BinaryIO, io.BufferedReader(_Limited(_decompressed(file, path.name)), _PIECE))


@contextmanager
def _open_tar(path: Path) -> Iterator[TarReader]:
    with open_unpacked(path) as stream:
        yield TarReader(stream)


def _decompressed(file: BinaryIO, name: str) -> IO[bytes]:
    if name.endswith((".gz", ".tgz")):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if name.endswith(".bz2"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if name.endswith((".xz", ".txz", ".lzma")):
        return cast(IO[bytes], _XzFile(file))
    return file


class _XzFile:
    """What `lzma.LZMAFile` does, with a limit for the memory that the file's header asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder: lzma.LZMADecompressor | None = None
        self._rest = b""

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder is None or self._decoder.eof:
                # A file may be several streams, with zeros after each.
                rest = (self._decoder.unused_data if self._decoder else b"").lstrip(b"\0") or self._file.read(_PIECE)
                if not rest.lstrip(b"\0"):
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            elif self._decoder.needs_input:
                rest = self._file.read(_PIECE)
                if not rest:
                    raise EOFError("cut off")
            else:
                rest = b""
            if data := self._decoder.decompress(rest, size):
                return data


class _Limited(io.RawIOBase):
    """A stream that only goes forward, and not beyond MAX_UNPACKED_BYTES."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream
        self._left = MAX_UNPACKED_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise OSError("unpacks to more than is looked at")
        buffer[: len(data)] = data
        return len(data)


def _zip_times(path: Path) -> Iterator[datetime]:
    """Times of a zip have no zone; they are taken as UTC.  A zip64's directory lies elsewhere and is not looked for."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        # The end record is the last thing but for a comment of at most 64 KiB.
        file.seek(max(size - 65557, 0))
        tail = file.read()
        at = tail.rfind(_ZIP_END)
        if at < 0:
            return
        count, _, offset = struct.unpack_from("<HII", tail, at + 10)
        file.seek(offset)
        for _ in range(count):
            signature, time, date, *lengths = _ZIP_ENTRY.unpack(file.read(_ZIP_ENTRY.size))
            if signature != b"PK\x01\x02":
                return
            file.seek(sum(lengths), io.SEEK_CUR)
            if found := _dos_time(date, time):
                yield found


def _dos_time(date: int, time: int) -> datetime | None:
    """FAT's time: seconds are even, years count from 1980."""
    day = (1980 + (date >> 9), date >> 5 & 15, date & 31)
    try:
        return datetime(*day, time >> 11, time >> 5 & 63, (time & 31) * 2, tzinfo=UTC)
    except ValueError:
        return None
