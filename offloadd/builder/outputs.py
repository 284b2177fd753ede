"""The outputs of a build on their way back: a tar from a guest that may be hostile, and files in a directory of the user's.

Nothing of the tar is unpacked before all of it was checked, and nothing is ever written through a link: each directory on the
way is opened by itself.  Links that lead out of the outputs (as a Python virtual environment's do) are left out and named.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from offloadd.builder.tar import Kind, Member, TarError, TarReader
from offloadd.errors import BuildFailedError, HostError, ProtocolError, UsageError

MAX_BYTES = 16 << 30
MAX_MEMBERS = 1_000_000
_MAX_LEFT_OUT = 1000
_MAX_PART = 255
"""Linux's NAME_MAX in bytes."""
_MAX_DEPTH = 256
"""Of a name, in parts: programs that remove a tree recursively, as Python's own, fail below some 1000."""
_MAX_MEAN_DEPTH = 32
"""Of all names: each part may be a directory to be made, so that a small tar could fill a file system with them."""


class OutputsReceiver:
    """Takes the pieces of a guest's tar; made by `open_outputs_receiver`."""

    def __init__(self, descriptor: int, path: Path, max_bytes: int) -> None:
        self.path = path
        self.size = 0
        self.complete = False
        """Whether the guest said that this was all."""
        self._descriptor = descriptor
        self._max_bytes = max_bytes

    def write(self, piece: bytes) -> None:
        """Append a piece.

        Raises:
            ProtocolError: it comes after the end.
            BuildFailedError: it is too much.
            HostError: the disk is full.
        """
        self._count(len(piece))
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as exc:
            raise self._failure(exc) from exc

    def copy(self, source: int, offset: int, size: int) -> None:
        """Append `size` bytes of the file `source` (a descriptor) from `offset` on.  Blocks: call it in a thread.

        Raises:
            ProtocolError: the file is shorter, or as `write`.
            BuildFailedError, HostError: as `write`.
        """
        self._count(size)
        try:
            while size:
                count = os.sendfile(self._descriptor, source, offset, size)
                if not count:
                    raise ProtocolError("the guest's disk ends within the outputs")
                offset, size = offset + count, size - count
        except OSError as exc:
            raise self._failure(exc) from exc

    def _count(self, size: int) -> None:
        if self.complete:
            raise ProtocolError("the guest sent more outputs after their end")
        self.size += size
        if self.size > self._max_bytes:
            raise BuildFailedError(f"the outputs are larger than {self._max_bytes} bytes")

    def _failure(self, exc: OSError) -> HostError:
        return HostError(f"cannot keep the outputs: {exc.strerror}", subject=str(self.path))

    def finish(self) -> None:
        """Note that this was all; ProtocolError when it was all before."""
        if self.complete:
            raise ProtocolError("the guest ended its outputs twice")
        self.complete = True


@contextmanager
def open_outputs_receiver(path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[OutputsReceiver]:
    """A receiver that writes to the new file `path`, which stays behind; HostError when it cannot be made."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise HostError(f"cannot keep the outputs: {exc.strerror}", subject=str(path)) from exc
    try:
        yield OutputsReceiver(descriptor, path, max_bytes)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """What `unpack_outputs` did."""

    files: int
    size: int
    """Bytes in the files."""
    left_out: tuple[str, ...]
    """Links that were not made because they lead out of the outputs, as `NAME -> WHERE`; the first thousand."""


def unpack_outputs(tar: Path, target: Path, *, max_members: int = MAX_MEMBERS) -> Unpacked:
    """Unpack a guest's outputs into `target`; files of the same name are replaced.  Blocks: call it in a thread.

    Raises:
        ProtocolError: the tar is damaged or has something that our build service never sends; nothing was unpacked then.
        UsageError: something in `target`, or an earlier member, is in the way: a directory where a file goes, or the other way
            round.
        HostError: the disk is full, or `target` cannot be written.
    """
    try:
        with tar.open("rb") as file:
            parts = 0
            for member in TarReader(file, max_members=max_members):
                _check(member)
                parts += member.name.count("/") + 1
                if parts > _MAX_MEAN_DEPTH * max_members:
                    raise TarError("too many directories")
            file.seek(0)
            target.mkdir(parents=True, exist_ok=True)
            with _opened(os.open(target, os.O_RDONLY | os.O_DIRECTORY)) as top:
                return _unpack(TarReader(file, max_members=max_members), top)
    except TarError as exc:
        raise ProtocolError(f"the guest's outputs are refused: {exc}") from exc
    except (NotADirectoryError, IsADirectoryError, _InTheWayError) as exc:
        raise UsageError(
            f"{exc.filename} is in the way", subject=str(target), hint="choose another directory for the outputs"
        ) from exc
    except OSError as exc:
        raise HostError(f"cannot unpack the outputs: {exc.strerror}", subject=str(target)) from exc


class _InTheWayError(OSError):
    """Something at a place that is to be a directory is none; `filename` is relative to the target."""


@contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check(member: Member) -> None:
    if member.kind is Kind.HARD_LINK:
        raise TarError(f"{member.name!r} is a hard link")
    if member.name.count("/") >= _MAX_DEPTH:
        raise TarError(f"the name {member.name[:200]!r}... is nested too deeply")
    if any(len(os.fsencode(part)) > _MAX_PART for part in member.name.split("/")):
        raise TarError(f"the name {member.name[:200]!r}... is too long")


def leads_out(name: str, link: str) -> bool:
    """Whether the link `name` -> `link` could lead out of the top directory.

    `..` is only taken at its beginning, where it starts from a directory that is known to be real: behind another link's name
    it would start from wherever that one leads.
    """
    parts = [part for part in link.split("/") if part not in ("", ".")]
    depth = name.count("/")
    ups = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return link.startswith("/") or ups > depth or ".." in parts[ups:]


def _unpack(reader: TarReader, top: int) -> Unpacked:
    files = size = 0
    left_out: list[str] = []
    for member in reader:
        *parents, last = member.name.split("/")
        with _opened(_open_directory(top, parents)) as parent:
            if member.kind is Kind.DIRECTORY:
                os.close(_open_directory(top, [*parents, last], member.mode & 0o755 | 0o700))
            elif member.kind is Kind.SYMLINK and leads_out(member.name, member.link):
                if len(left_out) < _MAX_LEFT_OUT:
                    left_out.append(_printable(f"{member.name} -> {member.link}"))
            else:
                _remove(parent, last, member.name)
                if member.kind is Kind.SYMLINK:
                    os.symlink(member.link, last, dir_fd=parent)
                else:
                    _write_file(reader, member, parent, last)
                    files, size = files + 1, size + member.size
    return Unpacked(files=files, size=size, left_out=tuple(left_out))


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _open_directory(top: int, parts: Sequence[str], mode: int = 0o755) -> int:
    """A descriptor of the directory `parts` below `top`, whose missing components are made; links are not followed."""
    descriptor = os.dup(top)
    for index, part in enumerate(parts):
        with _opened(descriptor) as parent:
            try:
                with suppress(FileExistsError):
                    os.mkdir(part, mode if index == len(parts) - 1 else 0o755, dir_fd=parent)
                descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            except OSError as exc:
                if exc.errno in (errno.ENOTDIR, errno.ELOOP):
                    raise _InTheWayError(exc.errno, exc.strerror, "/".join(parts[: index + 1])) from exc
                raise
    return descriptor


def _remove(parent: int, last: str, name: str) -> None:
    """Remove what has the member's name, so that nothing is ever written into a file (or through a link) that was there."""
    try:
        os.unlink(last, dir_fd=parent)
    except FileNotFoundError:
        pass
    except IsADirectoryError as exc:
        raise IsADirectoryError(exc.errno, exc.strerror, name) from exc


def _write_file(reader: TarReader, member: Member, parent: int, last: str) -> None:
    descriptor = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for piece in reader.content():
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
        os.fchmod(descriptor, member.mode & 0o755 | 0o600)
        os.utime(descriptor, (member.mtime, member.mtime))
