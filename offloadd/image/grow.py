"""A disk of somebody else's is made larger, with its last partition and the file system in that."""

from __future__ import annotations

from pathlib import Path

import trio

from offloadd.errors import ImageError
from offloadd.image.ext import FileSystem
from offloadd.image.partitions import empty_last, last_to_grow
from offloadd.process import run_program


async def grow_disk(disk: Path, size: int, room: Path, name: str) -> None:
    """Make the raw disk `disk` `size` bytes large.

    Args:
        room: a directory for the file system on its way: resize2fs cuts the file off where it thinks that the file system ends,
            which is wrong by what stands before it.
        name: the image's.
    Raises:
        ImageError: its last partition cannot grow, or the file system in it is damaged; the host's disk is full.
        HostError: e2fsprogs is missing.
    """
    last = await trio.to_thread.run_sync(last_to_grow, disk, name)
    await FileSystem(disk, last.start, room, name).repair()
    alone = room / "file-system"
    await _copy(disk, alone, name, "iflag=skip_bytes,count_bytes", f"skip={last.start}", f"count={last.size}")
    grown = await trio.to_thread.run_sync(empty_last, disk, last, size, name)
    await _run(name, room, "resize2fs", alone.name, f"{grown.size // 1024}K")
    await _copy(alone, disk, name, "oflag=seek_bytes", f"seek={grown.start}")
    await trio.to_thread.run_sync(alone.unlink)


async def _copy(source: Path, target: Path, name: str, *options: str) -> None:
    """Zeros become holes: the target has none but zeros there."""
    argv = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=sparse,notrunc", "status=none", *options]
    await _run(name, target.parent, *argv)


async def _run(name: str, folder: Path, *argv: str) -> None:
    await run_program(argv, cwd=folder, subject=f"image {name}", error=ImageError, disk=folder)
