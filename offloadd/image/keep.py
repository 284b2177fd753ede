"""A disk of somebody else's is taken into the store: copied or unpacked, grown, made a guest of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import trio

import offloadd
from offloadd.digest import sparse_sha256
from offloadd.errors import ImageError
from offloadd.image.build import MANIFEST
from offloadd.image.customize import customize_hurd_debian
from offloadd.image.disk_file import DISK, Disk, file_digest, file_identity, read_disk
from offloadd.image.grow import grow_disk
from offloadd.image.unpack import packing
from offloadd.model.image import MAX_DISK_BYTES, FileImage
from offloadd.model.quantity import format_date, format_size
from offloadd.process import Progress, program_environment, run_program


async def keep_file(image: FileImage, folder: Path, source: Path, target: Path, progress: Progress) -> None:
    """Fill the directory `target` with the disk made of the file `source`, and a manifest.

    Args:
        folder: that of the description.
        source: the file, fetched already when it comes from a URL.
    Raises:
        ConfigError: there is no such file.
        ImageError: it is not what was declared, or no disk; it was changed meanwhile; the host's disk is full.
        HostError: a program is missing.
    """
    before = await trio.to_thread.run_sync(file_identity, source)
    digest, disk = await trio.to_thread.run_sync(file_digest, image, folder), target / DISK
    packed = packing(image.path or image.url or "")
    if packed:
        await _check_sha256(image, source, source, progress)
        await _unpack(image, source, packed, disk, progress)
    else:
        progress(f"copying {source.name}", None)
        # Where the file system can, the copy takes no room of its own.
        await _run(image, disk, "cp", "--reflink=auto", "--sparse=always", "--", str(source), str(disk))
        await _check_sha256(image, disk, source, progress)
    await trio.to_thread.run_sync(disk.chmod, 0o644)
    found = await trio.to_thread.run_sync(read_disk, disk, image.name, image.format)
    if await trio.to_thread.run_sync(file_identity, source) != before:
        raise ImageError("was changed while it was copied", subject=image.name, hint=f"who writes to {source}?")
    found = await _change(image, found, disk, progress)
    await trio.to_thread.run_sync(_write_manifest, image, digest, found, target)


async def _check_sha256(image: FileImage, file: Path, source: Path, progress: Progress) -> None:
    # What was fetched has been checked; to read some GB again costs little beside that.
    if image.sha256 is None:
        return
    progress(f"checking {source.name}", None)
    if (is_now := await trio.to_thread.run_sync(_sha256, file)) != image.sha256:
        what = f"its SHA-256 is {is_now}, not that of its description"
        raise ImageError(what, subject=image.name, hint=f"has somebody changed {source}?")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _unpack(image: FileImage, source: Path, packed: str, disk: Path, progress: Progress) -> None:
    said = [""]

    def on_line(line: str) -> None:
        if match := re.fullmatch(r"@([\d.]+) (.*)", line):
            progress(f"{match[2]} {source.name}", float(match[1]))
        else:
            said.append(line)

    # Ours first, then what makes our own imports work.
    path = os.pathsep.join([str(Path(offloadd.__file__).parent.parent), *filter(None, sys.path)])
    env = program_environment({"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
    argv = [sys.executable, "-m", "offloadd.image.unpack", str(source), packed, str(disk), str(MAX_DISK_BYTES)]
    progress(f"unpacking {source.name}", 0.0)
    try:
        await run_program(argv, on_line=on_line, env=env, subject=image.name, error=ImageError, disk=disk, called="unpacking")
    except ImageError as exc:
        if exc.hint:
            raise
        hint = "it must be one disk: compressed, or alone in a tar"
        raise ImageError(f"cannot be unpacked: {said[-1] or exc.what}", subject=image.name, hint=hint) from exc


async def _change(image: FileImage, found: Disk, disk: Path, progress: Progress) -> Disk:
    """The disk as it is declared: large enough, and a guest of ours."""
    larger = image.size is not None and image.size > found.size
    if not larger and image.customize is None:
        return found
    if found.format == "qcow2":
        await _make_raw(image, found, disk, progress)
    room = disk.parent / "room"
    await trio.to_thread.run_sync(room.mkdir)
    if larger:
        assert image.size is not None
        progress(f"making it {format_size(image.size)} large", None)
        await grow_disk(disk, image.size, room, image.name)
    if image.customize == "hurd-debian":
        await customize_hurd_debian(disk, room, image.name, progress)
    await _run(image, disk, "rm", "-r", "--", str(room))
    return Disk(format="raw", size=(await trio.to_thread.run_sync(disk.stat)).st_size)


async def _make_raw(image: FileImage, found: Disk, disk: Path, progress: Progress) -> None:
    """Other programs know nothing of qcow2; what a guest writes goes to an overlay in any case."""
    if found.size > MAX_DISK_BYTES:
        raise ImageError(f"is a disk of more than {MAX_DISK_BYTES >> 30} GiB", subject=image.name)
    raw = disk.with_suffix(".raw")
    progress("taking it out of the qcow2 file", None)
    await _run(image, disk, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw))
    await trio.to_thread.run_sync(raw.replace, disk)


async def _run(image: FileImage, disk: Path, *argv: str) -> None:
    await run_program(argv, subject=f"image {image.name}", error=ImageError, disk=disk.parent)


def _write_manifest(image: FileImage, digest: str, disk: Disk, target: Path) -> None:
    file = target / DISK
    manifest = {
        "name": image.name,
        "digest": digest,
        "recipe": image.to_json(),
        "files": {DISK: {"sparse_sha256": sparse_sha256(file), "size": file.stat().st_size}},
        "disk": {"format": disk.format, "size": disk.size},
        "kernel_version": "",
        "packages": {},
        "made": format_date(datetime.now(UTC)),
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
