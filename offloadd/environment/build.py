"""Making an environment: bootstrap to a tar, tar to squashfs; nothing is unpacked here."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import trio

from offloadd.cache import remove_tree, scratch
from offloadd.debian import bootstrap, find_mirrors, installed_packages
from offloadd.digest import sparse_sha256
from offloadd.environment.recipe import EnvironmentRecipe
from offloadd.errors import ImageError
from offloadd.model.quantity import format_date
from offloadd.process import Progress, program_environment, read_program, run_program

DISK, MANIFEST = "root.squashfs", "environment.json"

NEWEST_FILE = 315619200
"""1980-01-02T00:00:00Z: no file is newer than any guest's clock is likely to be, and zip archives can hold the date."""

# `$1` is the root. The user `build` is the one that builds run as; the names are known without a resolver.
_HOOKS = (
    'echo "build:x:1000:1000::/build:/bin/sh" >>"$1/etc/passwd"',
    'echo "build:x:1000:" >>"$1/etc/group"',
    'echo "build:*:18262:0:99999:7:::" >>"$1/etc/shadow"',
    'echo "build:!::" >>"$1/etc/gshadow"',
    'mkdir -p "$1/build" "$1/proc" "$1/sys" "$1/run" && chown 1000:1000 "$1/build"',
    'printf "127.0.0.1\\tlocalhost offload\\n::1\\tlocalhost\\n" >"$1/etc/hosts"',
    'echo offload >"$1/etc/hostname"; : >"$1/etc/resolv.conf"',
)
_BOOTSTRAP_PART = 0.9


async def build_environment(recipe: EnvironmentRecipe, mirror: str | None, target: Path, progress: Progress) -> None:
    """Fill the directory `target` with the environment's files.

    Args:
        mirror: a URI; None for those of the host's apt configuration.

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
        packages=recipe.packages,
        mirrors=await find_mirrors(recipe.suite, override=mirror),
        scratch=room,
        hooks=_HOOKS,
        epoch=NEWEST_FILE,
        subject=str(recipe),
        progress=lambda phase, fraction: progress(phase, None if fraction is None else fraction * _BOOTSTRAP_PART),
    )
    progress("writing the disk", _BOOTSTRAP_PART)
    await make_disk(recipe, tar, target / DISK)
    progress("checking what was made", 0.98)
    await check_disk(recipe, target / DISK)
    status = await read_program(["tar", "-xOf", str(tar), "./var/lib/dpkg/status"], subject=str(recipe), error=ImageError)
    await trio.to_thread.run_sync(_write_manifest, recipe, target, installed_packages("\n".join(status)))
    await remove_tree(room)


async def make_disk(recipe: EnvironmentRecipe, tar: Path, disk: Path) -> None:
    """Make the squashfs.  Raises HostError, ImageError."""
    # lz4: under emulation a guest decompresses it several times faster than anything smaller.
    # sqfstar makes up the root directory itself; device files are the sandbox's business.  Version 4.5.1 once left out a
    # block of a file on a busy host, and said nothing.  Why is not known; races in the search for duplicates are (issue 361 of
    # plougher/squashfs-tools, of a later version), and we can do without it.
    argv = ["sqfstar", "-comp", "lz4", "-b", "128K", "-no-duplicates", "-no-progress", "-root-mode", "0755", str(disk), "dev/*"]
    env = program_environment({"SOURCE_DATE_EPOCH": str(NEWEST_FILE)})
    await run_program(argv, stdin=tar, env=env, subject=str(recipe), error=ImageError, disk=disk.parent)


async def check_disk(recipe: EnvironmentRecipe, disk: Path) -> None:
    """Read all of it once, before builds are told that it is good.

    It finds what cannot be decompressed; bytes that are wrong and can be, it does not.
    Raises:
        HostError: unsquashfs is missing.
        ImageError: a part cannot be read.
    """
    argv = ["unsquashfs", "-quiet", "-no-progress", "-pf", "/dev/null", str(disk)]
    await run_program(argv, env=program_environment(), subject=str(recipe), error=ImageError)


def _write_manifest(recipe: EnvironmentRecipe, target: Path, packages: dict[str, str]) -> None:
    disk = target / DISK
    manifest = {
        "digest": recipe.digest,
        "recipe": recipe.to_json(),
        "packages": packages,
        "files": {DISK: {"size": disk.stat().st_size, "sparse_sha256": sparse_sha256(disk)}},
        "made": format_date(datetime.now(UTC)),
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
