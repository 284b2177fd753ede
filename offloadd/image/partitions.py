"""Where the file systems of a raw disk lie: MBR, GPT, or a file system without a partition table.

Everything that is read here was written by others: each number is checked against the size of the disk.
Sources: UEFI specification 2.10, chapter 5 (MBR and GPT); Linux's Documentation/filesystems/ext4/super.rst.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from offloadd.errors import ImageError
from offloadd.model.image import SECTOR

TABLE_AT, TABLE_ENTRIES = 446, 4
_ENTRY = struct.Struct("<B3xB3xII")
"""Of an MBR: active, type, first sector, number of sectors."""
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_MAX_LOGICAL = 64
_GPT = struct.Struct("<8sIII4xQQQQ16sQIII")
"""Signature, revision, header's size and CRC; own and other place, first and last usable sector, GUID; the entries' place,
number, size and CRC."""
_GPT_MAGIC = b"EFI PART"
_GPT_MAX_ENTRIES = 128
_GPT_ENTRY_BYTES = 128
_GPT_RESERVED = 34
"""Sectors at the end of the disk: the second copy of 128 entries, and its header."""
_SUPERBLOCK_AT = 1024
_MAX_BLOCK_LOG = 6
"""64 KiB."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A part of the disk; `number` counts as the table does, 0 is the whole disk."""

    number: int
    start: int
    size: int
    """Both in bytes."""
    entry_at: int
    """Where its entry lies in an MBR or a GPT, in bytes."""
    table: str
    """`mbr`, `logical` (inside of an extended one), `gpt` or `none`."""

    @property
    def end(self) -> int:
        return self.start + self.size


def find_partitions(path: Path, name: str) -> list[Partition]:
    """The partitions of a raw disk, by their place on it.  Blocks.

    Args:
        name: the image's.
    Raises:
        ImageError: the table makes no sense.
        OSError: the file cannot be read.
    """
    with path.open("rb") as disk:
        size = os.fstat(disk.fileno()).st_size
        entries = list(_read_mbr(disk, 0))
        if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
            found = list(_read_gpt(disk, name))
        else:
            found = list(_mbr_partitions(disk, entries))
        # A boot sector without a table is that of a file system which fills the disk; its code may look like entries.
        if has_ext(disk, 0) and not all(part.end <= size for part in found):
            found = []
    if not found:
        return [Partition(number=0, start=0, size=size, entry_at=0, table="none")]
    ordered = sorted(found, key=lambda part: part.start)
    ends = [0, *(part.end for part in ordered)]
    if any(part.start < end for part, end in zip(ordered, ends, strict=False)) or ends[-1] > size:
        raise ImageError("its partition table makes no sense: partitions overlap or lie outside of the disk", subject=name)
    return ordered


def _read_mbr(disk: BinaryIO, at: int) -> Iterator[tuple[int, int, int, int]]:
    """(number from 1, type, first sector, sectors) of the entries that are used in the sector at `at`."""
    disk.seek(at)
    sector = disk.read(SECTOR)
    if sector[SECTOR - 2 :] != b"\x55\xaa":
        return
    for index in range(TABLE_ENTRIES):
        active, kind, first, count = _ENTRY.unpack_from(sector, TABLE_AT + index * _ENTRY.size)
        if kind and count and active in (0, 0x80):
            yield index + 1, kind, first, count


def _mbr_partitions(disk: BinaryIO, entries: list[tuple[int, int, int, int]]) -> Iterator[Partition]:
    for number, kind, first, count in entries:
        if kind in _EXTENDED:
            yield from _logical_partitions(disk, first)
        elif first:
            at = TABLE_AT + (number - 1) * _ENTRY.size
            yield Partition(number=number, start=first * SECTOR, size=count * SECTOR, entry_at=at, table="mbr")


def _logical_partitions(disk: BinaryIO, extended: int) -> Iterator[Partition]:
    """A chain of sectors: each has one partition, and the place of the next sector, both relative."""
    at = extended
    for number in range(5, 5 + _MAX_LOGICAL):
        following = None
        for index, kind, first, count in _read_mbr(disk, at * SECTOR):
            if kind in _EXTENDED:
                following = extended + first
            else:
                where = at * SECTOR + TABLE_AT + (index - 1) * _ENTRY.size
                start = (at + first) * SECTOR
                yield Partition(number=number, start=start, size=count * SECTOR, entry_at=where, table="logical")
        if following is None or following <= at:
            return
        at = following


def _read_gpt(disk: BinaryIO, name: str) -> Iterator[Partition]:
    disk.seek(SECTOR)
    header = disk.read(SECTOR)
    fields = _GPT.unpack_from(header.ljust(_GPT.size, b"\0"))
    magic, entries_at, count, entry_size = fields[0], fields[9], fields[10], fields[11]
    inside = entries_at * SECTOR + count * entry_size <= os.fstat(disk.fileno()).st_size
    if magic != _GPT_MAGIC or count > _GPT_MAX_ENTRIES or entry_size != _GPT_ENTRY_BYTES or not inside:
        raise ImageError("its GPT is not understood", subject=name)
    for index in range(count):
        where = entries_at * SECTOR + index * entry_size
        disk.seek(where)
        entry = disk.read(48).ljust(48, b"\0")
        first, last = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]) and last >= first:
            size = (last - first + 1) * SECTOR
            yield Partition(number=index + 1, start=first * SECTOR, size=size, entry_at=where, table="gpt")


def has_ext(disk: BinaryIO, start: int) -> bool:
    """Whether an ext2, ext3 or ext4 file system begins at `start` (bytes)."""
    disk.seek(start + _SUPERBLOCK_AT)
    block = disk.read(64)
    if len(block) < 64 or block[56:58] != b"\x53\xef":
        return False
    (log_size,) = struct.unpack_from("<I", block, 24)
    return bool(log_size <= _MAX_BLOCK_LOG)


def last_to_grow(path: Path, name: str) -> Partition:
    """The last partition of a raw disk, or the whole disk.  Blocks.

    Raises:
        ImageError: that one cannot grow.
    """
    last = find_partitions(path, name)[-1]
    if last.table == "logical":
        raise _not_grown("its last partition lies inside of an extended one, which is not grown", name)
    with path.open("rb") as disk:
        if not has_ext(disk, last.start):
            what = "it has no" if last.table == "none" else f"its last partition ({last.number}) has no"
            raise _not_grown(f"{what} ext2, ext3 or ext4, and nothing else is grown", name)
    return last


def _not_grown(what: str, name: str) -> ImageError:
    return ImageError(what, subject=name, hint="leave `size` out, or grow it with other tools")


def empty_last(path: Path, last: Partition, size: int, name: str) -> Partition:
    """Make the raw disk `size` bytes large, and its last partition reach to its end and empty; that partition.  Blocks."""
    # What ends inside of a block of the file system is of no use: whole MiB, as partitioning programs take them.
    end = (size - _GPT_RESERVED * SECTOR if last.table == "gpt" else size) >> 20 << 20
    grown = Partition(**vars(last) | {"size": max(end - last.start, last.size)})
    if last.table == "mbr" and grown.size // SECTOR >= 1 << 32:
        raise _not_grown("an MBR has no numbers for a partition of that size", name)
    with path.open("r+b") as disk:
        disk.truncate(last.start)
        disk.truncate(max(size, grown.end))
        if last.table == "mbr":
            disk.seek(last.entry_at + 12)
            disk.write(struct.pack("<I", grown.size // SECTOR))
        elif last.table == "gpt":
            _write_gpt(disk, size // SECTOR, grown)
    return grown


def _write_gpt(disk: BinaryIO, sectors: int, grown: Partition) -> None:
    """Both copies of the table for a disk of that many sectors, and the last sector of `grown`."""
    disk.seek(SECTOR)
    _, revision, _, _, _, _, first, _, guid, entries_at, count, entry_size, _ = _GPT.unpack(disk.read(_GPT.size))
    disk.seek(grown.entry_at + 40)
    disk.write(struct.pack("<Q", grown.end // SECTOR - 1))
    disk.seek(entries_at * SECTOR)
    entries = disk.read(count * entry_size)
    for own, other, place in ((1, sectors - 1, entries_at), (sectors - 1, 1, sectors - _GPT_RESERVED + 1)):
        numbers = (own, other, first, sectors - _GPT_RESERVED, guid, place, count, entry_size, zlib.crc32(entries))
        blank = _GPT.pack(_GPT_MAGIC, revision, _GPT.size, 0, *numbers)
        disk.seek(place * SECTOR)
        disk.write(entries)
        disk.seek(own * SECTOR)
        disk.write(_GPT.pack(_GPT_MAGIC, revision, _GPT.size, zlib.crc32(blank), *numbers).ljust(SECTOR, b"\0"))
    # The protective entry of the MBR covers the disk.
    disk.seek(TABLE_AT + 12)
    disk.write(struct.pack("<I", min(sectors - 1, 0xFFFFFFFF)))
