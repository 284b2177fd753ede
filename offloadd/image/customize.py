"""A disk of Debian GNU/Hurd becomes a guest of ours without being booted: accounts, sshd's settings, the secret service."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from offloadd.errors import ImageError
from offloadd.image import accounts
from offloadd.image.ext import Entry, FileSystem
from offloadd.image.partitions import find_partitions, has_ext
from offloadd.paths import shipped
from offloadd.process import Progress

FORMAT = 1
"""Raised when the same disk begins to come out different."""


@dataclass(frozen=True, kw_only=True)
class GuestFile:
    """A file of ours: where it goes, its mode, its name below images/guest/hurd."""

    path: str
    mode: int
    source: str


FILES = (
    GuestFile(path="/usr/lib/offload/secret-service", mode=0o755, source="secret-service"),
    GuestFile(path="/usr/lib/offload/install-packages", mode=0o755, source="install-packages"),
    GuestFile(path="/etc/ssh/sshd_config.d/offload.conf", mode=0o644, source="sshd_config"),
)
_FOLDERS = ("/usr/lib/offload", "/etc/ssh/sshd_config.d", "/etc/ssh/authorized_keys.d")
_EDITS: Mapping[str, Callable[[str], str]] = {
    "/etc/passwd": accounts.with_account,
    "/etc/group": accounts.with_group,
    "/etc/shadow": accounts.with_shadow,
    "/etc/gshadow": accounts.with_gshadow,
    "/etc/inittab": accounts.with_secret_service,
    "/etc/ssh/sshd_config": accounts.with_include,
}
_OPTIONAL = ("/etc/gshadow",)
_NEEDED = {
    "/etc/passwd": "it has no /etc/passwd",
    "/etc/inittab": "it has no /etc/inittab: does it start with sysvinit?",
    "/usr/sbin/sshd": "openssh-server is not installed in it",
    "/usr/bin/perl": "perl-base is not installed in it",
}
_PLAIN_KIND = re.compile(r"regular|symlink")


def guest_files() -> dict[str, bytes]:
    """The content of each of `FILES` by its path in the guest.  Blocks."""
    folder = shipped() / "images/guest/hurd"
    return {file.path: (folder / file.source).read_bytes() for file in FILES}


async def customize_hurd_debian(disk: Path, room: Path, name: str, progress: Progress) -> None:
    """Put our files into the root file system of the raw disk `disk`.

    Args:
        room: an empty directory beside it, for files on their way.
        name: the image's.
    Raises:
        ImageError: no root file system is found, it is damaged or full, or it is no Debian with sysvinit, sshd and Perl.
        HostError: e2fsprogs is missing.
    """
    progress("putting our files into its file system", None)
    system = await _find_root(disk, room, name)
    await system.repair()
    for path, what in _NEEDED.items():
        about = await system.about(path)
        if about is None or not _PLAIN_KIND.fullmatch(about.kind):
            raise ImageError(f"cannot be made a guest of ours: {what}", subject=name)
    edited = [await _edit(system, path, edit, name) for path, edit in _EDITS.items()]
    folders = [Entry(path=path, mode=0o755) for path in _FOLDERS]
    home = Entry(path=accounts.HOME, mode=0o755, owner=(accounts.UID, accounts.UID))
    contents = await trio.to_thread.run_sync(guest_files)
    files = [Entry(path=file.path, mode=file.mode, content=contents[file.path]) for file in FILES]
    await system.write([*folders, home, *files, *(entry for entry in edited if entry is not None)])
    # debugfs leaves what is harmless to be mended, such as the index of a folder that it has added to.
    await system.repair()
    await system.check()


async def _find_root(disk: Path, room: Path, name: str) -> FileSystem:
    """The file system that has /hurd; else the one with /etc/passwd."""
    candidates = []
    for part in await trio.to_thread.run_sync(find_partitions, disk, name):
        if await trio.to_thread.run_sync(_is_ext, disk, part.start):
            candidates.append(FileSystem(disk, part.start, room, name))
    for path in ("/hurd", "/etc/passwd"):
        for system in candidates:
            if await system.about(path) is not None:
                return system
    what = "no ext2, ext3 or ext4 file system in it has /hurd or /etc/passwd"
    raise ImageError(f"cannot be made a guest of ours: {what}", subject=name)


def _is_ext(disk: Path, start: int) -> bool:
    with disk.open("rb") as file:
        return has_ext(file, start)


async def _edit(system: FileSystem, path: str, edit: Callable[[str], str], name: str) -> Entry | None:
    """The file with our lines in it, None when it is right already; its owner and mode stay."""
    content, about = await system.read(path), await system.about(path)
    if content is None or about is None:
        if path in _OPTIONAL:
            return None
        raise ImageError(f"cannot be made a guest of ours: it has no {path}", subject=name)
    try:
        # Any byte may stand in a comment, and comes out as it went in.
        changed = edit(content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    except ValueError as exc:
        raise ImageError(f"cannot be made a guest of ours: {path}: {exc}", subject=name) from exc
    return None if changed == content else Entry(path=path, mode=about.mode, content=changed, owner=about.owner)
