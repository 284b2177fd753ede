"""A disk that stands in for GNU/Hurd, which cannot be made here: Debian with the Linux kernel, on the hardware of a childhurd.

What is like Debian GNU/Hurd's own disk: one ext2 file system whose creator is the Hurd, GRUB, sysvinit, ifupdown, an sshd with
its own settings, a compiler, Perl; an IDE disk and an rtl8139 are all the devices that it has drivers for.  What is not: the
kernel, and with it the translators.  Nothing of ours is in it: `customize: hurd-debian` is to bring that.

Kept in the user's cache folder by the digest of how it is made.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from offloadd.cache import Cache, as_mapped_root, scratch
from offloadd.debian import bootstrap, find_mirrors
from offloadd.digest import json_digest
from offloadd.errors import ImageError
from offloadd.image.initramfs import Member, resolve_modules, write_cpio
from offloadd.paths import find_paths
from offloadd.process import run_program

from .boot_disk import SECTOR, START, write_boot_disk

PARTITION = START * SECTOR
"""Where its file system begins."""
SUITE = "bookworm"
PACKAGES = (
    *("linux-image-amd64", "sysvinit-core", "initscripts", "sysv-rc", "orphan-sysvinit-scripts", "kmod"),
    *("ifupdown", "netbase", "openssh-server", "build-essential", "fakeroot", "busybox-static"),
)
_MODULES = ("ata_piix", "ahci", "sd_mod", "8139cp", "crc32c_generic", "ext4")
_SIZE = "2G"
# What Debian's installer would write: no file in it is offload's.
_SETTINGS = """
set -e
cd "$1"
printf '/dev/sda1 / ext2 defaults,noatime 0 0\\n' >etc/fstab
printf 'auto lo eth0\\niface lo inet loopback\\niface eth0 inet static\\n address 10.0.2.15/24\\n gateway 10.0.2.2\\n' \
    >etc/network/interfaces
printf 'nameserver 10.0.2.3\\n' >etc/resolv.conf
printf 'childhurd\\n' >etc/hostname
printf '127.0.0.1 localhost childhurd\\n' >etc/hosts
printf 'Acquire::Languages "none";\\n' >etc/apt/apt.conf.d/languages
# Nobody waits for these, and each takes its time under emulation.
for script in hwclock.sh checkfs.sh checkroot.sh checkroot-bootclean.sh bootlogs procps sudo udev; do
    [ ! -e etc/init.d/$script ] || chroot . update-rc.d -f $script remove
done
"""
_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r module; do insmod "$module"; done </modules.list
until [ -b /dev/sda1 ]; do usleep 20000; done
mount -t ext4 -o noatime /dev/sda1 /root
/bin/busybox mount -o move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
"""
# Under emulation these save more than half of the boot: see the command line of our own guests (offloadd/plan/argv.py).
_CONFIG = """\
set root=(hd0,msdos1)
linux /boot/vmlinuz console=ttyS0 panic=-1 quiet net.ifnames=0 random.trust_cpu=on mitigations=off norandmaps cryptomgr.notests
initrd /boot/initrd.img
boot
"""
_WITHOUT = ("man", "locale", "info", "doc")
_UNPACK = """
set -e
cd "$1"
mkdir -m 0755 root
tar -x -p --numeric-owner --exclude='./dev/*' -f root.tar -C root
rm root.tar
cp root/boot/vmlinuz-* vmlinuz
chmod 0644 vmlinuz
"""
_WRITE = """
set -e
cd "$1"
rm -rf root/boot/* root/usr/lib/modules root/initrd.img* root/vmlinuz* root/var/lib/apt/lists/* root/var/cache/apt/*.bin
cp vmlinuz initrd.img root/boot
mke2fs -q -t ext2 -o hurd -I 128 -L root -m 0 -E nodiscard -d root root.ext2 "$2"
"""
_RECIPE = {
    "suite": SUITE,
    "packages": PACKAGES,
    "modules": _MODULES,
    "size": _SIZE,
    "texts": [_SETTINGS, _INIT, _CONFIG, _UNPACK, _WRITE, *_WITHOUT],
    "format": 1,
}


@contextmanager
def open_standin() -> Iterator[Path]:
    """The raw disk, made in two minutes where the cache has none; nobody may write to it."""
    cache = Cache(find_paths().cache / "hurd-standin", subject="disk", durable=False)
    digest = json_digest(_RECIPE)
    trio.run(cache.ensure, digest, _make)
    with cache.hold(digest) as found:
        assert found is not None
        # Those of earlier recipes, unless another run of the tests uses them.
        trio.run(cache.gc, [digest])
        yield found / "disk.raw"


async def _make(target: Path) -> None:
    room = scratch(target)
    await bootstrap(
        room / "root.tar",
        suite=SUITE,
        architecture="amd64",
        packages=PACKAGES,
        mirrors=await find_mirrors(SUITE),
        scratch=room,
        hooks=[_SETTINGS],
        dpkg_options=[f"path-exclude=/usr/share/{folder}/*" for folder in _WITHOUT],
        subject="disk",
    )
    await _as_root(_UNPACK, room)
    (room / "initrd.img").write_bytes(_make_initrd(room / "root"))
    await _as_root(_WRITE, room, _SIZE)
    write_boot_disk(target / "disk.raw", room / "root.ext2", _CONFIG, ["linux"])


async def _as_root(script: str, *arguments: str | Path) -> None:
    """The root file system's files belong to many users."""
    await run_program(as_mapped_root(["sh", "-c", script, "sh", *map(str, arguments)]), subject="disk", error=ImageError)


def _make_initrd(root: Path) -> bytes:
    [modules] = (root / "usr/lib/modules").iterdir()
    paths = resolve_modules(_MODULES, (modules / "modules.dep").read_text(), (modules / "modules.builtin").read_text())
    program, plain = stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
    members = [Member(name=name, mode=stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "proc", "root")]
    # The kernel opens /dev/console for the first process before anything can be mounted.
    members.append(Member(name="dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1)))
    members.append(Member(name="bin/busybox", mode=program, content=(root / "usr/bin/busybox").read_bytes()))
    members.append(Member(name="init", mode=program, content=_INIT.encode()))
    files = [modules / path for path in paths]
    members += [Member(name=f"modules/{file.name}", mode=plain, content=file.read_bytes()) for file in files]
    listing = "".join(f"/modules/{file.name}\n" for file in files)
    members.append(Member(name="modules.list", mode=plain, content=listing.encode()))
    return write_cpio(members)
