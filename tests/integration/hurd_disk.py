"""Raw disks with what our customising looks for, made of real file systems; and what is in them afterwards."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from pathlib import Path

MIB = 1 << 20
PASSWD = "root:x:0:0:root:/root:/bin/bash\ndemo:x:1000:1000:D\udce9mo,,,:/home/demo:/bin/bash\n"
SHADOW = "root::19000:0:99999:7:::\ndemo:$y$j9T$abc:19000:0:99999:7:::\n"
INITTAB = """id:2:initdefault:
si::sysinit:/etc/init.d/rcS
~~:S:wait:/sbin/sulogin --force
l0:0:wait:/etc/init.d/rc 0
l1:1:wait:/etc/init.d/rc 1
l2:2:wait:/etc/init.d/rc 2
l3:3:wait:/etc/init.d/rc 3
1:2345:respawn:/sbin/getty 38400 tty1
"""
SSHD = "# comment\nInclude /etc/ssh/sshd_config.d/*.conf\nUsePAM yes\nAcceptEnv LANG LC_*\n"


def debian_tree(folder: Path, *, hurd: bool = True) -> Path:
    """The files of a Debian with sysvinit that matter here."""
    for name in ("etc/ssh", "usr/sbin", "usr/bin", "usr/lib", "var/lib", "home/demo", *(["hurd"] if hurd else [])):
        (folder / name).mkdir(parents=True)
    files = {
        "etc/passwd": (PASSWD, 0o644),
        "etc/group": ("root:x:0:\ndemo:x:1000:\n", 0o644),
        "etc/shadow": (SHADOW, 0o640),
        "etc/gshadow": ("root:*::\ndemo:!::\n", 0o640),
        "etc/inittab": (INITTAB, 0o644),
        "etc/ssh/sshd_config": (SSHD, 0o644),
        "usr/sbin/sshd": ("sshd", 0o755),
        "usr/bin/perl": ("perl", 0o755),
    }
    for path, (text, mode) in files.items():
        (folder / path).write_text(text, errors="surrogateescape")
        (folder / path).chmod(mode)
    return folder


def make_ext(file: Path, size: int, tree: Path | None, *options: str) -> bytes:
    """A file system of `size` bytes with the content of `tree`, owned by root."""
    file.unlink(missing_ok=True)
    root = ["-d", str(tree), "-E", "root_owner=0:0"] if tree else []
    subprocess.run(["mke2fs", "-q", "-F", *options, *root, str(file), f"{size // 1024}k"], check=True)
    return file.read_bytes()


def mbr(*parts: tuple[int, int, int]) -> bytes:
    """A boot sector with partitions (type, start in MiB, size in MiB)."""
    entries = b"".join(struct.pack("<B3xB3xII", 0, kind, start * 2048, size * 2048) for kind, start, size in parts)
    return (b"\xfa" * 446 + entries).ljust(510, b"\0") + b"\x55\xaa"


def put(disk: Path, at: int, content: bytes, total: int) -> Path:
    """`content` at `at` of a sparse disk of `total` bytes."""
    with disk.open("r+b" if disk.exists() else "wb") as out:
        out.truncate(total)
        out.seek(at)
        out.write(content)
    return disk


def gpt(disk: Path, start: int, size: int) -> None:
    """A GPT with one partition (in MiB) on the disk, its first copy alone: as after the disk was made larger."""
    sectors = disk.stat().st_size // 512
    entry = struct.pack("<16s16sQQ", b"\x01" * 16, b"\x02" * 16, start * 2048, (start + size) * 2048 - 1)
    entries = entry.ljust(128 * 128, b"\0")

    def header(crc: int) -> bytes:
        numbers = (1, sectors - 1, 34, sectors - 34, b"\x03" * 16, 2, 128, 128, zlib.crc32(entries))
        return struct.pack("<8sIII4xQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, *numbers)

    protective = struct.pack("<B3xB3xII", 0, 0xEE, 1, sectors - 1)
    with disk.open("r+b") as out:
        out.write((bytes(446) + protective).ljust(510, b"\0") + b"\x55\xaa")
        out.write(header(zlib.crc32(header(0))).ljust(512, b"\0") + entries)


def debugfs(disk: Path, start: int, command: str) -> str:
    argv = ["debugfs", "-R", command, f"{disk}?offset={start}"]
    found = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return found.stdout.decode("utf-8", "surrogateescape")


def about(disk: Path, start: int, path: str) -> tuple[int, int, int]:
    """Mode, user and group."""
    text = debugfs(disk, start, f"stat {path}")
    mode, owner = re.search(r"Mode:\s+(\d+)", text), re.search(r"User:\s*(\d+)\s+Group:\s*(\d+)", text)
    assert mode, path
    assert owner, path
    return int(mode[1], 8), int(owner[1]), int(owner[2])


def assert_sound(disk: Path, start: int) -> None:
    argv = ["e2fsck", "-f", "-n", f"{disk}?offset={start}"]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def room(disk: Path, start: int) -> int:
    """Bytes of the file system."""
    text = debugfs(disk, start, "show_super_stats -h")
    count, size = re.search(r"Block count:\s+(\d+)", text), re.search(r"Block size:\s+(\d+)", text)
    assert count
    assert size
    return int(count[1]) * int(size[1])
