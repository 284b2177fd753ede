"""From a root file system's tar to an image's files. A program: `python -m offloadd.image.assemble PLAN`.

It runs as root, or as the root of a user namespace, because the files inside belong to many users.  It reads its plan
(JSON) from a file and prints its progress as lines `@FRACTION PHASE`; what else it prints is an error's text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

from offloadd.debian import installed_packages
from offloadd.image.initramfs import InitramfsError, make_initramfs


class PlanFile(TypedDict):
    """A guest file: where it goes, its mode, where its content lies."""

    path: str
    mode: int
    source: str


class Plan(TypedDict):
    """What `build.py` wants done; paths are absolute."""

    tar: str
    root: str
    """Where to unpack; must not exist."""
    output: str
    size: int
    modules: list[str]
    files: list[PlanFile]


ACCOUNTS = (
    # name, uid, home, shell
    ("offloading", 900, "/var/lib/offloading", "/bin/sh"),
    ("build", 1000, "/build", "/bin/sh"),
)
# What the packages' scripts leave of the host, or of a first boot that never comes.
_UNWANTED = (
    "etc/ssh/ssh_host_*",
    "etc/machine-id",
    "var/lib/dbus/machine-id",
    "initrd.img*",
    "vmlinuz*",
    "var/log/*.log",
    "var/log/apt/*",
)


def main(argv: list[str]) -> int:
    """Do what the plan in the file `argv[1]` says; the exit status."""
    plan: Plan = json.loads(Path(argv[1]).read_text())
    try:
        _assemble(plan)
    except (InitramfsError, OSError) as exc:
        print(exc)
        return 1
    except subprocess.CalledProcessError as exc:
        print(f"{exc.cmd[0]} failed with status {exc.returncode}")
        return 1
    return 0


def _assemble(plan: Plan) -> None:
    root, output = Path(plan["root"]), Path(plan["output"])
    _tell(0.0, "unpacking the root file system")
    root.mkdir(mode=0o755)
    # Device files cannot be made in a user namespace, and the guest's are the kernel's.
    _run("tar", "-x", "-p", "--numeric-owner", "--exclude=./dev/*", "-f", plan["tar"], "-C", str(root))
    Path(plan["tar"]).unlink()
    _tell(0.4, "installing the guest's files")
    for pattern in _UNWANTED:
        for file in root.glob(pattern):
            file.unlink()
    for folder in ("dev", "proc", "sys", "run"):
        (root / folder).mkdir(mode=0o755, exist_ok=True)
    # Each guest gets another one; to write it to the disk would cost a clone 20 ms under TCG.
    (root / "etc/machine-id").symlink_to("/run/machine-id")
    for guest_file in plan["files"]:
        _install(root, guest_file)
    _compile(root)
    for name, uid, home, shell in ACCOUNTS:
        add_account(root, name, uid, home, shell)
    (root / "usr/lib/offload/modules").write_text(" ".join(plan["modules"]) + "\n")
    _tell(0.45, "making the kernel's files")
    version = _take_kernel(root, output)
    (output / "initramfs.img").write_bytes(make_initramfs(root, version, plan["modules"]))
    _tell(0.5, "writing the disk")
    _make_disk(root, output / "root.ext4", plan["size"])
    facts = {"kernel_version": version, "packages": installed_packages((root / "var/lib/dpkg/status").read_text())}
    (output / "facts.json").write_text(json.dumps(facts))
    _tell(0.95, "removing the unpacked root file system")
    shutil.rmtree(root)


def _tell(fraction: float, phase: str) -> None:
    print(f"@{fraction} {phase}", flush=True)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def _inside(root: Path, path: str) -> Path:
    """`path` of the guest, through the guest's own links of folders (`/bin` is a link in Debian)."""
    target = root
    for part in Path(path).parts[1:-1]:
        target = target / part
        if target.is_symlink():
            link = str(target.readlink())
            target = root / link.lstrip("/") if link.startswith("/") else target.parent / link
        target.mkdir(mode=0o755, exist_ok=True)
    return target / Path(path).name


def _install(root: Path, file: PlanFile) -> None:
    target = _inside(root, file["path"])
    # A link is replaced, not followed: /etc/resolv.conf may point anywhere.
    target.unlink(missing_ok=True)
    shutil.copyfile(file["source"], target)
    target.chmod(file["mode"])


def _compile(root: Path) -> None:
    """Python bytecode of our own programs' modules: to compile them at each boot costs half a second under emulation.

    The image works without it, e.g. when the root is of an architecture that this host cannot run.
    """
    if (root / "usr/bin/python3").exists():
        argv = ["chroot", str(root), "/usr/bin/python3", "-IS", "-m", "compileall", "-q"]
        subprocess.run(
            [*argv, "--invalidation-mode", "unchecked-hash", "/usr/lib/offload"], check=False, stdin=subprocess.DEVNULL
        )


def add_account(root: Path, name: str, uid: int, home: str, shell: str) -> None:
    """Add a user and a group of the same number. The password `*` admits no password, but sshd does not call it locked."""
    _append(root / "etc/passwd", f"{name}:x:{uid}:{uid}::{home}:{shell}\n")
    _append(root / "etc/group", f"{name}:x:{uid}:\n")
    _append(root / "etc/shadow", f"{name}:*:18262:0:99999:7:::\n")
    _append(root / "etc/gshadow", f"{name}:!::\n")
    folder = _inside(root, home)
    folder.mkdir(mode=0o755, exist_ok=True)
    os.chown(folder, uid, uid)


def _append(file: Path, line: str) -> None:
    with file.open("a") as out:
        out.write(line)


def _take_kernel(root: Path, output: Path) -> str:
    """Move the newest kernel to the output; its version."""
    kernels = sorted((root / "boot").glob("vmlinu[xz]-*"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if not kernels:
        raise InitramfsError("the recipe's packages have no kernel in /boot")
    # A copy, as /boot may lie on another file system than the output.
    shutil.copyfile(kernels[-1], output / "vmlinuz")
    for file in (root / "boot").iterdir():
        file.unlink()
    return kernels[-1].name.split("-", 1)[1]


def _make_disk(root: Path, disk: Path, size: int) -> None:
    """A sparse ext4 file system with the content of `root`.

    Each VM writes to an overlay that is thrown away: checksums and reserved blocks would only cost time.  So would a journal,
    but without one Linux keeps the inodes of removed files back for minutes (fs/ext4/ialloc.c, `recently_deleted`), and looks
    at them for each file that is made: with 2,000 files removed twice before, 2,000 new ones took three times as long.
    """
    with disk.open("wb") as out:
        out.truncate(size)
    features = "has_journal,^metadata_csum,uninit_bg,^resize_inode"
    options = ["-L", "root", "-m", "0", "-O", features, "-E", "nodiscard,lazy_journal_init=1"]
    _run("mke2fs", "-q", "-F", "-t", "ext4", *options, "-d", str(root), str(disk))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
