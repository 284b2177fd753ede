"""What is carried into a guest and out of it: the same bytes in every run, as one file or as many."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from bench.measure import BenchError

_BLOCK = 1 << 20
_FOLDERS = 100


@dataclass(frozen=True, kw_only=True)
class Load:
    """A tree of files on the host."""

    name: str
    """For people."""
    folder: Path
    files: int
    size: int
    """Of all files, in bytes."""


def make_big(folder: Path, size: int) -> Load:
    """One file, which no compression makes smaller."""
    folder.mkdir(parents=True)
    with (folder / "big").open("wb") as file:
        for start in range(0, size, _BLOCK):
            file.write(_noise(start, min(_BLOCK, size - start)))
    return Load(name=f"1 file of {size >> 20:,} MiB", folder=folder, files=1, size=size)


def make_small(folder: Path, files: int, size: int = 4096) -> Load:
    """Many files of `size` bytes each, in a hundred directories."""
    for number in range(files):
        parent = folder / f"{number % _FOLDERS:02}"
        if number < _FOLDERS:
            parent.mkdir(parents=True)
        (parent / f"{number:06}").write_bytes(_noise(number, size))
    return Load(name=f"{files:,} files of {size >> 10} KiB", folder=folder, files=files, size=files * size)


def _noise(seed: int, size: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(8)).digest(size)


def check_and_remove(load: Load, copy: Path) -> None:
    """What came back is what was sent, as far as its names and sizes tell.

    Raises:
        BenchError: it is not.
    """
    sizes = {path.relative_to(copy): path.stat().st_size for path in copy.rglob("*") if path.is_file()}
    if len(sizes) != load.files or sum(sizes.values()) != load.size:
        raise BenchError(f"{load.name}: {len(sizes)} files of {sum(sizes.values())} bytes came back")
    shutil.rmtree(copy)
