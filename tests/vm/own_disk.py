"""A disk that stands for those which others make: GRUB, a kernel and an init of its own, and a receiver of secrets on TCP."""

from __future__ import annotations

import shutil
from pathlib import Path

from .boot_disk import run, write_boot_disk

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
    run("cp", "--reflink=auto", "--sparse=always", image / "root.ext4", root)
    commands = [
        *(f"write {image / name} /boot/{name}" for name in ("vmlinuz", "initramfs.img")),
        "rm /usr/lib/offload/init",
        f"write {_INIT} /usr/lib/offload/init",
        "set_inode_field /usr/lib/offload/init mode 0100755",
        "rm /usr/lib/offload/guest-agent",
    ]
    (room / "commands").write_text("\n".join(commands) + "\n")
    done = run("/sbin/debugfs", "-w", "-f", room / "commands", root)
    assert "not found" not in done, done
    write_boot_disk(room / "disk", root, _CONFIG, ["linux"])
    (room / "disk").rename(disk)
    shutil.rmtree(room)
