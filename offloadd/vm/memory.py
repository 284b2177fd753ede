"""A guest's memory in a file, so that it can be saved, and so that many guests can go on from where one was saved.

The file is a memfd (memfd_create(2)).  QEMU insists on opening its guest's memory for writing, also where it maps it privately:
a memfd that is sealed against writing can be handed to a QEMU that is not trusted, and nothing can be removed or cut short
under a guest that runs on it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def open_memory(name: str, size: int = 0) -> int:
    """A new memory file of `size` bytes; its descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def seal_memory(fd: int) -> None:
    """Nobody can write to it any more.

    Raises:
        OSError: somebody still has it mapped for writing.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def copy_memory(fd: int, path: Path) -> None:
    """Write what the memory file holds to the new file `path`, holes as holes.  Blocks.

    Raises:
        OSError: the file cannot be written.
    """
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _copy_sparse(fd, target)
    finally:
        os.close(target)


def read_memory(path: Path) -> int:
    """A new memory file with the content of the file `path`; its descriptor.  Blocks.

    Raises:
        OSError: the file cannot be read.
    """
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd = open_memory(f"offload-{path.name}")
        try:
            _copy_sparse(source, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(source)


def _copy_sparse(source: int, target: int) -> None:
    size, at = os.fstat(source).st_size, 0
    os.ftruncate(target, size)
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole follows
                return
            raise
        at = os.lseek(source, begin, os.SEEK_HOLE)
        os.lseek(target, begin, os.SEEK_SET)
        while begin < at:
            begin += os.sendfile(target, source, begin, at - begin) or _cut_short(source)


def _cut_short(source: int) -> int:
    raise OSError(errno.EIO, "it got shorter while it was read")


@dataclass(frozen=True, kw_only=True)
class SavedGuest:
    """A guest that was saved, ready for others to go on from it."""

    digest: str
    """Of its template."""
    ram: int
    """A sealed memory file, as the others."""
    state: int
    """Of its devices."""
    frozen: int
    """The disk that it had written."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where a guest that is about to run will be saved."""

    ram: int
    """A memory file of the guest's size."""
