"""Making an image: bootstrap, assemble, manifest."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import trio

import offloadd
from offloadd.cache import as_mapped_root, remove_tree, scratch
from offloadd.debian import bootstrap, find_mirrors
from offloadd.digest import sparse_sha256
from offloadd.errors import ImageError
from offloadd.image.assemble import Plan, PlanFile
from offloadd.image.digest import GuestContent
from offloadd.model.image import ImageRecipe
from offloadd.model.quantity import format_date
from offloadd.process import Progress, program_environment, run_program

DISK, KERNEL, INITRAMFS, MANIFEST = "root.ext4", "vmlinuz", "initramfs.img", "image.json"

# The guest is nobody's desk: what people read is left out, licences stay.
_WITHOUT_DOCS = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)
_BOOTSTRAP_PART = 0.85


async def build_image(
    recipe: ImageRecipe, digest: str, files: Sequence[GuestContent], target: Path, progress: Progress
) -> None:
    """Fill the directory `target` with the image's files.

    Raises:
        HostError: a program is missing.
        ImageError: a step failed, or the disk is full.
    """
    room = scratch(target)
    tar = room / "root.tar"
    await bootstrap(
        tar,
        suite=recipe.suite,
        architecture=recipe.architecture,
        packages=(recipe.kernel, *recipe.packages),
        mirrors=await find_mirrors(recipe.suite, override=recipe.mirror),
        scratch=room,
        dpkg_options=_WITHOUT_DOCS,
        check_valid_until=recipe.check_valid_until,
        subject=f"image {recipe.name}",
        progress=_part(progress, 0.0, _BOOTSTRAP_PART),
    )
    await _assemble(recipe, files, tar, target, _part(progress, _BOOTSTRAP_PART, 0.98 - _BOOTSTRAP_PART))
    progress("checking what was made", 0.98)
    await trio.to_thread.run_sync(_write_manifest, recipe, digest, target)
    await remove_tree(room)


def _part(progress: Progress, start: float, length: float) -> Progress:
    return lambda phase, fraction: progress(phase, None if fraction is None else start + length * fraction)


async def _assemble(recipe: ImageRecipe, files: Sequence[GuestContent], tar: Path, target: Path, progress: Progress) -> None:
    room = tar.parent
    plan = Plan(
        tar=str(tar),
        root=str(room / "root"),
        output=str(target),
        size=recipe.size,
        modules=list(recipe.modules),
        files=await trio.to_thread.run_sync(_spool, files, room),
    )
    (room / "plan.json").write_text(json.dumps(plan))

    def on_line(line: str) -> None:
        if match := re.fullmatch(r"@([\d.]+) (.*)", line):
            progress(match[2], float(match[1]))

    argv = as_mapped_root([sys.executable, "-m", "offloadd.image.assemble", str(room / "plan.json")])
    # Ours first, then what makes our own imports work.
    path = os.pathsep.join([str(Path(offloadd.__file__).parent.parent), *filter(None, sys.path)])
    env = program_environment({"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
    await run_program(argv, on_line=on_line, env=env, subject=f"image {recipe.name}", error=ImageError, disk=target)


def _spool(files: Sequence[GuestContent], room: Path) -> list[PlanFile]:
    planned = []
    for number, file in enumerate(files):
        source = room / f"file-{number}"
        source.touch(mode=0o600)  # others may enter the room, and a recipe's file may be for nobody else
        source.write_bytes(file.content)
        planned.append(PlanFile(path=file.path, mode=file.mode, source=str(source)))
    return planned


def _write_manifest(recipe: ImageRecipe, digest: str, target: Path) -> None:
    facts = json.loads((target / "facts.json").read_text())
    (target / "facts.json").unlink()
    files = {
        name: {"sparse_sha256": sparse_sha256(target / name), "size": (target / name).stat().st_size}
        for name in (DISK, INITRAMFS, KERNEL)
    }
    manifest = {"name": recipe.name, "digest": digest, "recipe": recipe.to_json(), "files": files, **facts}
    manifest["made"] = format_date(datetime.now(UTC))
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
