"""What we compare our boot with: the same Debian with systemd and Debian's own initramfs."""

from __future__ import annotations

import shlex
from pathlib import Path

from offloadd.cache import Cache, as_mapped_root, remove_tree, scratch
from offloadd.debian import bootstrap, find_mirrors
from offloadd.digest import json_digest
from offloadd.errors import ImageError
from offloadd.image.store import Image
from offloadd.paths import Paths
from offloadd.plan.machine import BootFiles
from offloadd.process import Progress, run_program

FORMAT = 1
READY = "offload-bench: multi-user reached"

_UNIT = f"""\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo "{READY}" >/dev/console'
"""
_HOOKS = (
    f'printf %s {shlex.quote(_UNIT)} >"$1/etc/systemd/system/offload-bench.service"',
    'mkdir -p "$1/etc/systemd/system/multi-user.target.wants"',
    'ln -s ../offload-bench.service "$1/etc/systemd/system/multi-user.target.wants/"',
    # As Debian's installer writes it.
    'echo "/dev/vda / ext4 errors=remount-ro 0 1" >"$1/etc/fstab"',
    # The bootstrap is told to leave it out, for our own images.
    'chroot "$1" env INITRD=Yes update-initramfs -c -k all',
)
_SCRIPT = """\
mkdir root && tar -x -p --numeric-owner --exclude='./dev/*' -f root.tar -C root
mkdir -p root/dev
# A first boot does more than every later one; mmdebstrap makes every boot the first.
tr -d - </proc/sys/kernel/random/uuid >root/etc/machine-id
cp root/boot/vmlinuz-* ../vmlinuz && cp root/boot/initrd.img-* ../initrd.img
mke2fs -q -F -t ext4 -d root ../root.ext4 8G
rm -r root root.tar
"""


async def ensure_systemd_image(ours: Image, paths: Paths, progress: Progress) -> BootFiles:
    """The image that compares with `ours`, made when there is none yet: same suite, packages and kernel.

    Raises:
        HostError, ImageError: it cannot be made.
    """
    recipe = ours.recipe
    packages = (recipe.kernel, *recipe.packages, "systemd-sysv")
    # With the versions: a mirror moves on, and then both are to be made anew.
    digest = json_digest(
        {"format": FORMAT, "hooks": _HOOKS, "script": _SCRIPT, "packages": packages, "versions": dict(ours.packages)}
    )

    async def make(target: Path) -> None:
        room = scratch(target)
        await bootstrap(
            room / "root.tar",
            suite=recipe.suite,
            architecture=recipe.architecture,
            packages=packages,
            mirrors=await find_mirrors(recipe.suite, override=recipe.mirror),
            scratch=room,
            hooks=_HOOKS,
            subject="systemd image",
            progress=progress,
        )
        argv = as_mapped_root(["sh", "-eu", "-c", _SCRIPT])
        await run_program(argv, cwd=room, subject="systemd image", error=ImageError, disk=target)
        await remove_tree(room)

    folder = await Cache(paths.cache / "bench", subject="systemd image", error=ImageError).ensure(digest, make, progress)
    return BootFiles(
        image="debian-systemd",
        digest=digest,
        kernel=folder / "vmlinuz",
        initramfs=folder / "initrd.img",
        disk=folder / "root.ext4",
    )
