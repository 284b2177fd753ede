"""The disk of an environment is read back before anybody gets it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from offloadd.environment.build import check_disk, make_disk
from offloadd.environment.recipe import environment_recipe
from offloadd.errors import ImageError

RECIPE = environment_recipe("bookworm", "amd64")
FILES = 20


async def make(folder: Path) -> Path:
    with tarfile.open(folder / "root.tar", "w") as archive:
        for number in range(FILES):
            member = tarfile.TarInfo(f"./file-{number}")
            text = "".join(f"{number} {line}\n" for line in range(30_000)).encode()
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    disk = folder / "root.squashfs"
    await make_disk(RECIPE, folder / "root.tar", disk)
    return disk


async def test_a_disk_that_is_whole(tmp_path: Path) -> None:
    await check_disk(RECIPE, await make(tmp_path))


async def test_a_block_that_is_lost(tmp_path: Path) -> None:
    disk = await make(tmp_path)
    whole = disk.read_bytes()
    place = len(whole) // 2
    # What follows stands where compressed bytes should be: not all damage can be found by decompressing, this can.
    disk.write_bytes(whole[:place] + whole[place + 1000 : place + 101_000] + whole[place + 100_000 :])
    with pytest.raises(ImageError, match="unsquashfs") as caught:
        await check_disk(RECIPE, disk)
    assert "uncompress" in caught.value.render()
