"""A disk that stands for those which others make: GRUB, a kernel and an init of its own, and a receiver of secrets on TCP."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

SECTOR = 512
START = 2048
"""The first sector of the only partition; GRUB lies before it."""
GRUB = Path("/usr/lib/grub/i386-pc")
"""Of Debian's grub-pc-bin."""
_CONFIG = """\
set root=(hd0,msdos1)
linux /boot/vmlinuz root=/dev/vda1 console=ttyS0 panic=-1 quiet
initrd /boot/initramfs.img
boot
"""
_INIT = Path(__file__).with_name("own_disk_init")


def make_own_disk(image: Path, disk: Path) -> None:
    """Make the raw file `disk` from one of our images, whose directory is `image`: the same Debian with another init."""
    room = disk.with_name("making")
    room.mkdir()
    root = room / "root.ext4"
    _run("cp", "--reflink=auto", "--sparse=always", image / "root.ext4", root)
    commands = [
        *(f"write {image / name} /boot/{name}" for name in ("vmlinuz", "initramfs.img")),
        "rm /usr/lib/offload/init",
        f"write {_INIT} /usr/lib/offload/init",
        "set_inode_field /usr/lib/offload/init mode 0100755",
        "rm /usr/lib/offload/guest-agent",
    ]
    (room / "commands").write_text("\n".join(commands) + "\n")
    done = _run("/sbin/debugfs", "-w", "-f", room / "commands", root)
    assert "not found" not in done, done
    (room / "grub.cfg").write_text(_CONFIG)
    core = room / "core.img"
    modules = ("biosdisk", "part_msdos", "ext2", "linux")
    _run(
        *("grub-mkimage", "-d", GRUB, "-O", "i386-pc", "-p", "(hd0,msdos1)/boot", "-c", room / "grub.cfg", "-o", core),
        *modules,
    )
    _write_disk(disk, root, (GRUB / "boot.img").read_bytes(), core.read_bytes())
    shutil.rmtree(room)


def _write_disk(disk: Path, root: Path, boot: bytes, core: bytes) -> None:
    assert SECTOR + len(core) < START * SECTOR
    sectors = root.stat().st_size // SECTOR
    # Active, Linux, by number of sectors; the addresses by cylinder are for BIOSes of the last century.
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", START, sectors)
    with disk.open("wb") as out:
        out.write(boot[:446] + entry + bytes(48) + b"\x55\xaa")
        out.write(core)
        out.truncate((START + sectors) * SECTOR)
    _copy_data(root, disk, START * SECTOR)


def _copy_data(source: Path, target: Path, offset: int) -> None:
    """What is no hole: to read 8 GiB of them takes half a minute."""
    with source.open("rb") as read, target.open("r+b") as write:
        at, size = 0, source.stat().st_size
        while at < size:
            try:
                at = os.lseek(read.fileno(), at, os.SEEK_DATA)
            except OSError:
                return  # only a hole follows
            end = os.lseek(read.fileno(), at, os.SEEK_HOLE)
            while at < end:
                piece = os.pread(read.fileno(), min(end - at, 1 << 20), at)
                at += os.pwrite(write.fileno(), piece, offset + at)


def _run(*argv: str | Path) -> str:
    done = subprocess.run(list(map(str, argv)), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv[0]}: {done.stderr}"
    return done.stdout + done.stderr
