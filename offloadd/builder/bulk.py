"""Much of a build's data, on disks: where a guest can be given some, frames are for what is small.

The source goes in as a squashfs, which the guest mounts: nothing is unpacked, and only what the build reads is read.  The tar
of the outputs comes out on a scratch disk.  Which it is, is decided by the size of the tar alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import trio

from offloadd.builder.outputs import MAX_BYTES, OutputsReceiver
from offloadd.errors import HostError, ProtocolError
from offloadd.process import program_environment, run_program

BULK_BYTES = 8 << 20
"""A tar that is larger goes by disk.  The guest's build service has the same number."""
TAR_BLOCK = 512
SOURCE_DISK = "source.squashfs"
_COPY_BYTES = 16 << 20
"""Copied at a time; a cancelled build waits no longer."""

DataChannel = Literal["frames", "disk"]


class Disks(Protocol):
    """A guest into which disks can be plugged."""

    async def attach(self, path: Path, *, writable: bool = False) -> str:
        """Put in a raw image file; the serial by which the guest finds it.

        The file's name may be removed afterwards.
        Raises:
            HostError: the file cannot be opened.
            MachineLostError: the machine refused it or went away.
        """


def bulk_channel(size: int) -> DataChannel:
    """What a tar of `size` bytes goes by where disks are taken."""
    return "disk" if size > BULK_BYTES else "frames"


def channel_for(size: int, disks: Disks | None) -> DataChannel:
    """The same for a place with these disks; None: it takes none."""
    return "frames" if disks is None else bulk_channel(size)


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """A writable disk for the outputs.  What is on it is a hostile guest's."""

    serial: str
    descriptor: int
    """Of its file."""
    size: int
    """Of the disk, in bytes."""

    async def copy(self, size: object, outputs: OutputsReceiver) -> None:
        """Add the first bytes of the disk to the outputs.

        Args:
            size: how many, as the guest says.
        Raises:
            ProtocolError: that cannot be.
            BuildFailedError, HostError: as `OutputsReceiver.write`.
        """
        if type(size) is not int or size % TAR_BLOCK or not BULK_BYTES < size <= self.size:
            raise ProtocolError(f"the guest says that {repr(size)[:100]} bytes of outputs are on a disk of {self.size}")
        for offset in range(0, size, _COPY_BYTES):
            count = min(_COPY_BYTES, size - offset)
            await trio.to_thread.run_sync(outputs.copy, self.descriptor, offset, count)


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """The disks of one build."""

    source: str | None
    """The serial of the source's disk; None: it goes in frames."""
    scratch: Scratch | None


NO_DISKS = Bulk(source=None, scratch=None)


@asynccontextmanager
async def open_bulk(disks: Disks | None, tar: Path) -> AsyncIterator[Bulk]:
    """The disks for a build whose source is `tar`; their files, made beside it, are gone with the block.

    Args:
        disks: None where there can be none.
    Raises:
        HostError: sqfstar is missing, the disk is full.
        MachineLostError: the machine refused a disk or went away.
    """
    if disks is None:
        yield NO_DISKS
        return
    source = None
    if channel_for((await trio.Path(tar).stat()).st_size, disks) == "disk":
        disk = tar.with_name(SOURCE_DISK)
        try:
            await make_source_disk(tar, disk)
            source = await disks.attach(disk)
        finally:
            await trio.Path(disk).unlink(missing_ok=True)
    with _open_scratch_file(tar.parent) as descriptor:
        serial = await disks.attach(Path(f"/proc/self/fd/{descriptor}"), writable=True)
        yield Bulk(source=source, scratch=Scratch(serial=serial, descriptor=descriptor, size=MAX_BYTES))


async def make_source_disk(tar: Path, disk: Path) -> None:
    """Make a squashfs of the tar, whose files belong to the user whom builds run as in a guest.

    Raises:
        HostError: sqfstar is missing, or the disk is full.
    """
    argv = [
        *("sqfstar", "-quiet", "-no-progress"),
        # It is read once: whatever makes it smaller takes longer than it saves, on both sides.
        *("-noI", "-noD", "-noF", "-noX", "-no-duplicates"),
        # With numbers for its files, by which an overlay knows those that have several names.
        *("-exports", "-force-uid", "1000", "-force-gid", "1000", str(disk)),
    ]
    env = program_environment()
    # It would give all files its date.
    env.pop("SOURCE_DATE_EPOCH", None)
    await run_program(argv, stdin=tar, env=env, subject="source", disk=disk.parent)


@contextmanager
def _open_scratch_file(folder: Path) -> Iterator[int]:
    """A descriptor of a new file without a name, which takes no room until something is written to it."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            file.truncate(MAX_BYTES)
        except OSError as exc:
            raise HostError(f"cannot make a disk for the outputs: {exc.strerror}", subject=str(folder)) from exc
        yield file.fileno()
