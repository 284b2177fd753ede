"""The drives of a machine, into which disks are put while it runs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import trio

from offloadd.errors import HostError, MachineLostError
from offloadd.plan.argv import empty_slot, slot_is_writable, slot_name
from offloadd.vm.qmp import Qmp

TAKE_OUT_S = 10.0


class Drives:
    """Which of them hold a disk.

    Args:
        count: how many the machine was started with.
    """

    def __init__(self, qmp: Qmp, count: int) -> None:
        self._qmp = qmp
        self._count = count
        self._taken: set[int] = set()

    async def put_in(self, path: Path, *, writable: bool) -> str:
        """Put a raw image file into a free drive; the drive's serial in the guest.

        QEMU keeps the file open: its name may be removed.
        Raises:
            HostError: it cannot be opened.
            MachineLostError: all drives are taken; QEMU refused it or went away.
        """
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(f"cannot open {path}: {exc.strerror}", subject=self._qmp.instance) from exc
        try:
            number = self._take(writable=writable)
            try:
                await self._add(fd, number, writable=writable)
                await self._show(number, _disk(number))
            except BaseException:
                with trio.move_on_after(TAKE_OUT_S, shield=True), suppress(MachineLostError):
                    await self._empty(number)
                    self._taken.remove(number)
                raise
        finally:
            os.close(fd)
        return slot_name(number)

    async def take_out(self, slot: str) -> None:
        """Empty the drive: the guest must have let go of what is in it, or reads zeros from there on.

        Raises:
            MachineLostError: QEMU refused it or went away.
            TooSlowError: QEMU takes too long.  In both cases the drive stays taken.
        """
        number = next(number for number in self._taken if slot_name(number) == slot)
        with trio.fail_after(TAKE_OUT_S):
            await self._show(number, empty_slot(number))
            await self._qmp.execute("blockdev-del", node_name=_disk(number))
        self._taken.remove(number)

    async def clear(self) -> None:
        """Empty all of them, whoever has put something there.

        Raises:
            MachineLostError: QEMU refused it or went away.
        """
        for number in range(self._count):
            await self._empty(number)
        self._taken.clear()

    def _take(self, *, writable: bool) -> int:
        for number in range(self._count):
            if number not in self._taken and slot_is_writable(number) == writable:
                self._taken.add(number)
                return number
        raise MachineLostError(
            "all of its drives are taken",
            subject=self._qmp.instance,
            hint="fewer builds in it at a time; or stop and start it: offload vm stop",
        )

    async def _add(self, fd: int, number: int, *, writable: bool) -> None:
        async with self._qmp.handed_over(fd) as name:
            file = {"driver": "file", "filename": name, "read-only": not writable}
            # What is written need not outlive the host: flushes would cost much and save nothing.
            given = {"driver": "raw", "read_only": not writable, "cache": {"no-flush": True}, "file": file}
            await self._qmp.execute("blockdev-add", node_name=_disk(number), **given)

    async def _show(self, number: int, node: str) -> None:
        await self._qmp.execute("qom-set", path=_path(number), property="drive", value=node)

    async def _empty(self, number: int) -> None:
        """Whether there is a disk or not: a command that was sent may have been done."""
        # QEMU 7.2 aborts when a drive is to show what it shows already.
        if await self._qmp.execute("qom-get", path=_path(number), property="drive") == _disk(number):
            await self._show(number, empty_slot(number))
        with suppress(MachineLostError):
            await self._qmp.execute("blockdev-del", node_name=_disk(number))


def _path(number: int) -> str:
    return f"/machine/peripheral/{slot_name(number)}"


def _disk(number: int) -> str:
    """QEMU's name of the disk in a drive."""
    return f"disk{number}"
