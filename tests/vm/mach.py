"""Disks from which the real GNU Mach starts: kernels of Debian sid's binary packages, and nothing that they could run.

Kept in the user's cache folder by the digest of how they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from offloadd.cache import Cache, scratch
from offloadd.debian import find_mirrors, read_apt_options
from offloadd.digest import json_digest
from offloadd.errors import HostError
from offloadd.paths import find_paths
from offloadd.process import program_environment, run_program

from .boot_disk import run, write_boot_disk

SUITE = "sid"
KERNELS = {"i586-gnu": ("i386", "gnumach-image-1-486"), "x86_64-gnu": ("amd64", "gnumach-image-1-amd64")}
"""System type -> Debian's architecture, and the package that depends on the newest kernel's."""
# `console=com0` is found by the blank before it, so it cannot be the first word.
_CONFIG = """\
set root=(hd0,msdos1)
multiboot /boot/gnumach.gz console=com0
boot
"""
_APT_CONF = """\
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::State "{folder}";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
// A mirror's index of sid is now and then older than it says it may be.
Acquire::Check-Valid-Until "false";
"""


@contextmanager
def open_mach(system: str) -> Iterator[Path]:
    """The raw disk whose kernel is Mach for `system`, made where the cache has none; nobody may write to it."""
    cache = Cache(find_paths().cache / "mach", subject="disk", durable=False)
    digest = json_digest({"suite": SUITE, "kernel": KERNELS[system], "grub": _CONFIG, "format": 1})
    trio.run(cache.ensure, digest, partial(_make, system))
    with cache.hold(digest) as found:
        assert found is not None
        yield found / "disk.raw"


async def _make(system: str, target: Path) -> None:
    room = scratch(target)
    await _fetch(room, *KERNELS[system])
    boot = room / "root/boot"
    boot.mkdir(parents=True)
    for package in (room / "archives").glob("*.deb"):
        await run_program(["dpkg-deb", "--extract", str(package), str(room / "unpacked")], error=HostError)
    [kernel] = (room / "unpacked/boot").iterdir()
    kernel.rename(boot / "gnumach.gz")
    file_system = room / "root.ext2"
    run("/sbin/mke2fs", "-q", "-t", "ext2", "-o", "hurd", "-d", boot.parent, file_system, "4M")
    write_boot_disk(target / "disk.raw", file_system, _CONFIG, ["multiboot", "gzio"])


async def _fetch(folder: Path, architecture: str, package: str) -> None:
    """The package, and what it depends on, below `folder`/archives; apt runs nothing of them and needs no root."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text("".join(f"{mirror.line()}\n" for mirror in await find_mirrors(SUITE)))
    conf = _APT_CONF.format(folder=folder, architecture=architecture)
    (folder / "apt.conf").write_text(conf + "".join(f"{option}\n" for option in await read_apt_options()))
    env = program_environment({"APT_CONFIG": str(folder / "apt.conf")})
    for words in (["update"], ["install", "--download-only", "--yes", "--no-install-recommends", package]):
        await run_program(["apt-get", "--quiet", *words], env=env, subject="apt", error=HostError)
