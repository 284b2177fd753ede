"""SHA-256 of values and of sparse files."""

from __future__ import annotations

import hashlib
import json
import os
from io import FileIO
from pathlib import Path

_BLOCK = 64 * 1024
_ZEROS = bytes(_BLOCK)


def json_digest(value: object) -> str:
    """SHA-256 of `value` as JSON in one defined spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sparse_sha256(file: Path) -> str:
    """SHA-256 over the blocks of 64 KiB that are not all zeros, each after its number (8 bytes, big-endian), then the size.

    A disk of 8 GiB that holds 300 MiB is read as fast as its data; where the holes lie makes no difference. Blocks.
    """
    digest = hashlib.sha256()
    with FileIO(file) as disk:
        size = os.fstat(disk.fileno()).st_size
        at = 0
        while (at := _next_data(disk, at)) < size:
            at -= at % _BLOCK
            disk.seek(at)
            block = _read_block(disk)
            if block != _ZEROS[: len(block)]:
                digest.update((at // _BLOCK).to_bytes(8, "big") + block)
            at += _BLOCK
        digest.update(size.to_bytes(8, "big"))
    return digest.hexdigest()


def _next_data(disk: FileIO, at: int) -> int:
    """The first position from `at` that may hold data, or one past everything."""
    try:
        return os.lseek(disk.fileno(), at, os.SEEK_DATA)
    except OSError:
        # ENXIO: only a hole follows.
        return 1 << 62


def _read_block(disk: FileIO) -> bytes:
    block = b""
    while len(block) < _BLOCK and (piece := disk.read(_BLOCK - len(block))):
        block += piece
    return block
