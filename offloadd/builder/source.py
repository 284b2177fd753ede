"""The source of a build as a tar: the same bytes for the same tree, and no file newer than the guest's clock.

`make`, Meson and Ninja complain about inputs from the future, so that in a guest of 2020 no file may be of today.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from offloadd.builder.tar import END, PIECE, Kind, Member, TarError, TarReader, padding
from offloadd.errors import OffloadError, UsageError

_HINT = "leave it out of the source, or build from a copy without it"


def pack_source(directory: Path, *, exclude: Collection[Path] = (), newest: int | None = None) -> Iterator[bytes]:
    """The tree below `directory` as a pax tar, in pieces.  Blocks: iterate in a thread.

    Args:
        exclude: files and directories that are left out, absolute or relative to `directory`.
        newest: seconds since 1970; later file times are set back to it.
    Raises:
        UsageError: the tree holds a socket, device or fifo, a file that cannot be read, or one that changes meanwhile.
    """
    excluded = {_key(directory / path) for path in exclude}
    first_names: dict[tuple[int, int], str] = {}
    for path in _walk(directory, excluded):
        try:
            member = _member(path, str(path.relative_to(directory)), first_names)
            yield _clamped(member, newest).header()
            if member.kind is Kind.FILE:
                yield from _content(path, member.size)
        except OSError as exc:
            raise _unreadable(exc, path) from exc
    yield END


def measure_source(directory: Path, *, exclude: Collection[Path] = ()) -> int:
    """How many bytes `pack_source` would give; raises and blocks as it does, but opens no file."""
    excluded = {_key(directory / path) for path in exclude}
    first_names: dict[tuple[int, int], str] = {}
    size = len(END)
    for path in _walk(directory, excluded):
        try:
            member = _member(path, str(path.relative_to(directory)), first_names)
        except OSError as exc:
            raise _unreadable(exc, path) from exc
        size += len(member.header()) + member.size + len(padding(member.size))
    return size


def pack_files(files: Sequence[Path]) -> Iterator[bytes]:
    """Single files as a tar, under their own names.  Blocks, and raises as `pack_source`."""
    for path in sorted(files, key=lambda path: path.name):
        try:
            # Not what may be a link, as in a directory of downloads, but what it leads to.
            resolved = path.resolve(strict=True)
            member = replace(_member(resolved, path.name, {}), link="", kind=Kind.FILE)
            yield member.header()
            yield from _content(resolved, member.size)
        except OSError as exc:
            raise _unreadable(exc, path) from exc
    yield END


def _key(path: Path) -> str:
    # Not resolved: a link that is to be left out is the link itself.
    return os.path.normpath(path.absolute())


def _walk(directory: Path, excluded: set[str]) -> Iterator[Path]:
    """What is below `directory`, sorted by the names' bytes, each directory before what is in it."""
    waiting = [directory]
    while waiting:
        path = waiting.pop()
        if path != directory:
            yield path
        if path == directory or stat.S_ISDIR(path.lstat().st_mode):
            try:
                inside = [entry for entry in path.iterdir() if _key(entry) not in excluded]
            except OSError as exc:
                raise _unreadable(exc, path) from exc
            waiting += sorted(inside, key=lambda entry: os.fsencode(entry.name), reverse=True)


def _unreadable(exc: OSError, path: Path) -> OffloadError:
    return UsageError(f"cannot be read: {exc.strerror}", subject=str(exc.filename or path))


def _member(path: Path, name: str, first_names: dict[tuple[int, int], str]) -> Member:
    about = path.lstat()
    kind = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}.get(stat.S_IFMT(about.st_mode))
    if kind is None:
        raise UsageError(f"is a {_type_name(about.st_mode)}, which cannot be sent to a machine", subject=str(path), hint=_HINT)
    # pathlib's readlink would tidy up what it says.
    link = os.readlink(path) if kind is Kind.SYMLINK else ""  # noqa: PTH115
    if kind is Kind.FILE and about.st_nlink > 1:
        link = first_names.setdefault((about.st_dev, about.st_ino), name)
        kind, link = (Kind.FILE, "") if link == name else (Kind.HARD_LINK, link)
    return Member(
        name=name,
        kind=kind,
        mode=0o777 if kind is Kind.SYMLINK else about.st_mode & 0o777,
        size=about.st_size if kind is Kind.FILE else 0,
        mtime=max(int(about.st_mtime), 0),
        link=link,
    )


def _type_name(mode: int) -> str:
    names = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "fifo", stat.S_IFBLK: "block device", stat.S_IFCHR: "character device"}
    return names.get(stat.S_IFMT(mode), "special file")


def _clamped(member: Member, newest: int | None) -> Member:
    return member if newest is None or member.mtime <= newest else replace(member, mtime=max(newest, 0))


def _content(path: Path, size: int) -> Iterator[bytes]:
    """Exactly the `size` bytes that the header announces."""
    # A fifo that takes the file's place in this moment must not block us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        left = size
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise UsageError("got shorter while it was read", subject=str(path))
            left -= len(piece)
            yield piece
        if file.read(1):
            raise UsageError("grew while it was read", subject=str(path))
    yield padding(size)


def _check_place(member: Member, known: Mapping[str, Kind]) -> None:
    """TarError unless the member goes where nothing is, into a directory that came before it.

    Each program that unpacks a tar has its own ways with others, and sqfstar even crashes.
    """
    if member.name in known and not known[member.name] is member.kind is Kind.DIRECTORY:
        raise TarError(f"{_printable(member.name)} comes twice")
    if known.get(member.name.rpartition("/")[0]) is not Kind.DIRECTORY:
        raise TarError(f"{_printable(member.name)} comes without its directory")
    if member.kind is Kind.HARD_LINK and known.get(member.link) not in (Kind.FILE, Kind.HARD_LINK):
        raise TarError(f"{_printable(member.name)} is a hard link to a file that is not there")


def _printable(name: str) -> str:
    return os.fsencode(name[:200]).decode("utf-8", "backslashreplace")


def clamp_tar(src: BinaryIO, dst: BinaryIO, newest: int, *, leave_out: Collection[str] = ()) -> None:
    """Copy the tar `src` to `dst` with no file time after `newest`, in seconds since 1970.  Blocks: call it in a thread.

    `src` need not come from us: what a guest must not get (devices, names that lead out) is refused here.

    Args:
        leave_out: files and links of these names are not copied.
    Raises:
        UsageError: it is damaged, or has such members.
    """
    reader = TarReader(src)
    known: dict[str, Kind] = {"": Kind.DIRECTORY}
    try:
        for member in reader:
            if member.name in leave_out and member.kind is not Kind.DIRECTORY:
                continue
            _check_place(member, known)
            known[member.name] = member.kind
            dst.write(replace(_clamped(member, newest), mode=member.mode & 0o777).header())
            for piece in reader.content():
                dst.write(piece)
            dst.write(padding(member.size))
    except TarError as exc:
        raise UsageError(f"is not a tar that can be built from: {exc}", subject="source") from exc
    dst.write(END)
