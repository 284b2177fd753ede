"""A disk with GRUB in its master boot record and one partition."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

SECTOR = 512
START = 2048
"""The first sector of the only partition; GRUB lies before it."""
_GRUB = Path("/usr/lib/grub/i386-pc")
"""Of Debian's grub-pc-bin."""


def write_boot_disk(disk: Path, file_system: Path, config: str, modules: Sequence[str]) -> None:
    """Make the raw file `disk`.

    Args:
        file_system: an image of the partition's ext2, ext3 or ext4.
        config: what GRUB does, in the words of its shell.
        modules: what GRUB needs for that, beside what finds the partition.
    """
    settings, core = disk.with_name("grub.cfg"), disk.with_name("core.img")
    settings.write_text(config)
    options = ("-d", _GRUB, "-O", "i386-pc", "-p", "(hd0,msdos1)/boot", "-c", settings, "-o", core)
    run("grub-mkimage", *options, "biosdisk", "part_msdos", "ext2", *modules)
    _write(disk, file_system, (_GRUB / "boot.img").read_bytes(), core.read_bytes())
    settings.unlink()
    core.unlink()


def _write(disk: Path, file_system: Path, boot: bytes, core: bytes) -> None:
    assert SECTOR + len(core) < START * SECTOR
    sectors = file_system.stat().st_size // SECTOR
    # Active, Linux, by number of sectors; the addresses by cylinder are for BIOSes of the last century.
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", START, sectors)
    with disk.open("wb") as out:
        out.write(boot[:446] + entry + bytes(48) + b"\x55\xaa")
        out.write(core)
        out.truncate((START + sectors) * SECTOR)
    _copy_data(file_system, disk, START * SECTOR)


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


def run(*argv: str | Path) -> str:
    """What a program says on its way to success."""
    done = subprocess.run(list(map(str, argv)), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv[0]}: {done.stderr}"
    return done.stdout + done.stderr
