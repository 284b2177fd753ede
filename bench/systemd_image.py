"""What we compare our boot with: the same Debian with systemd and Debian's own initramfs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from offloadd.cache import Cache, as_mapped_root, remove_tree, scratch
from offloadd.debian import bootstrap, find_mirrors
from offloadd.digest import json_digest
from offloadd.errors import ImageError
from offloadd.image.store import Image
from offloadd.model.image import ImageRecipe
from offloadd.paths import Paths
from offloadd.plan.machine import BootFiles
from offloadd.process import Progress, run_program

FORMAT = 4
LABEL = "systemd"
"""Of the file system: `debvm-run` takes no disk without."""
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
    'chroot "$1" apt-get download "$(basename "$1"/boot/vmlinuz-* | sed "s/^vmlinuz-/linux-image-/; s/-cloud//")"',
    'mv "$1"/linux-image-*.deb "$1/full-kernel.deb"',
)
_SCRIPT = f"""\
mkdir root && tar -x -p --numeric-owner --exclude='./dev/*' -f root.tar -C root
mkdir -p root/dev
# A first boot does more than every later one; mmdebstrap makes every boot the first.
tr -d - </proc/sys/kernel/random/uuid >root/etc/machine-id
cp root/boot/vmlinuz-* ../vmlinuz && cp root/boot/initrd.img-* ../initrd.img
# Where `debvm-run` looks for it; the kernel's is there.
(cd root && ln -s boot/initrd.img-* initrd.img)
# `vng` wants a kernel with 9p, which the cloud's has not: the full one of the same source, with its modules beside it.
dpkg-deb -x root/full-kernel.deb root/full && mkdir root/full/bin && cp root/usr/bin/busybox root/full/bin
# Most of it is for hardware that is not there.
rm -r root/full/usr root/full/lib/modules/*/kernel/sound root/full/lib/modules/*/kernel/drivers/[!bcv]* root/full-kernel.deb
chroot root depmod -b /full "$(ls root/full/lib/modules)"
mv root/full ../full
mke2fs -q -F -t ext4 -L {LABEL} -d root ../root.ext4 8G
rm -r root root.tar
"""


@dataclass(frozen=True, kw_only=True)
class SystemdImage:
    """What others boot."""

    boot: BootFiles
    full: Path
    """A directory with Debian's full kernel of the same version in `boot`, `lib/modules` for it, and a static `bin/busybox`."""

    def full_kernel(self) -> Path:
        return next((self.full / "boot").glob("vmlinuz-*"))


async def ensure_systemd_image(ours: Image, paths: Paths, progress: Progress) -> SystemdImage:
    """The image that compares with `ours`, made when there is none yet: same suite, packages and kernel.

    Raises:
        HostError, ImageError: it cannot be made.
    """
    recipe = ours.recipe
    assert isinstance(recipe, ImageRecipe)
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
    boot = BootFiles(
        image="debian-systemd",
        digest=digest,
        kernel=folder / "vmlinuz",
        initramfs=folder / "initrd.img",
        disk=folder / "root.ext4",
    )
    return SystemdImage(boot=boot, full=folder / "full")
