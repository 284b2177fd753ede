"""Disks that come and go in the drives of a machine that runs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from offloadd.errors import HostError, MachineLostError
from offloadd.vm.drives import Drives
from offloadd.vm.instance import Instance

from .bare_qemu import HALT, Bench, descriptors, say, wait_for_console

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86 is not installed")


@pytest.fixture
def disk(bench: Bench) -> Path:
    """A file of a page that nobody else may read."""
    path = bench.root / "env.squashfs"
    path.write_bytes(bytes(4096))
    path.chmod(0o600)
    return path


@pytest.fixture
def scratch(bench: Bench) -> Path:
    path = bench.root / "scratch"
    path.write_bytes(bytes(8192))
    return path


@asynccontextmanager
async def up(bench: Bench, *, disk_slots: int = 3) -> AsyncIterator[Instance]:
    """A machine whose firmware is done with its drives: it makes QEMU open notifiers for their queues."""
    async with bench.open(replace(bench.plan(say(b"up") + HALT), disk_slots=disk_slots)) as instance:
        await wait_for_console(instance, "up")
        yield instance


async def inside(instance: Instance) -> dict[str, int]:
    """What is in its drives: the size of each, 1 TiB for one without a disk."""
    blocks = await instance._qmp.execute("query-block")
    found = {block["qdev"].split("/")[3]: block["inserted"] for block in blocks if "/slot" in block.get("qdev", "")}
    assert {name: one["ro"] for name, one in found.items()} == {name: int(name[4:]) % 3 != 2 for name in found}
    return {name: one["image"]["virtual-size"] for name, one in found.items()}


async def nodes(instance: Instance) -> set[str]:
    """QEMU's names of all disks."""
    return {block["node-name"] for block in await instance._qmp.execute("query-named-block-nodes")}


NONE = 1 << 40


async def test_a_disk_is_put_into_a_drive(bench: Bench, disk: Path, scratch: Path) -> None:
    async with up(bench) as instance:
        assert await inside(instance) == {"slot0": NONE, "slot1": NONE, "slot2": NONE}
        assert await instance.attach_disk(disk) == "slot0"
        assert await inside(instance) == {"slot0": 4096, "slot1": NONE, "slot2": NONE}
        assert await instance.attach_disk(disk) == "slot1"
        assert await instance.attach_disk(scratch, writable=True) == "slot2"
        assert await inside(instance) == {"slot0": 4096, "slot1": 4096, "slot2": 8192}
        # Its own copies alone: what was needed to hand them over is closed.
        held = descriptors(instance.record.pid)
        assert (held.count(str(disk)), held.count(str(scratch))) == (2, 1)
        assert str(disk) not in descriptors(os.getpid())


@pytest.mark.parametrize("writable", [False, True])
async def test_no_drive_is_free(bench: Bench, disk: Path, scratch: Path, writable: bool) -> None:
    async with up(bench) as instance:
        for _ in range(1 if writable else 2):
            await instance.attach_disk(disk, writable=writable)
        before = await inside(instance), await nodes(instance), descriptors(instance.record.pid)
        with pytest.raises(MachineLostError, match="all of its drives are taken") as caught:
            await instance.attach_disk(disk, writable=writable)
        assert caught.value.subject == "m"
        assert (await inside(instance), await nodes(instance), descriptors(instance.record.pid)) == before
        # The other kind is not touched by that.
        await instance.attach_disk(scratch, writable=not writable)


async def test_a_file_that_is_gone_takes_no_drive(bench: Bench, disk: Path, scratch: Path) -> None:
    async with up(bench) as instance:
        for writable in (False, True):
            for _ in range(3):
                with pytest.raises(HostError, match=r"cannot open .*nothing: No such file") as caught:
                    await instance.attach_disk(bench.root / "nothing", writable=writable)
                assert caught.value.subject == "m"
        assert [await instance.attach_disk(disk), await instance.attach_disk(disk)] == ["slot0", "slot1"]
        assert await instance.attach_disk(scratch, writable=True) == "slot2"


async def test_a_disk_is_taken_out_and_put_in_again(bench: Bench, disk: Path, scratch: Path) -> None:
    async with up(bench) as instance:
        counts = []
        empty = await nodes(instance)
        for _ in range(3):
            assert await instance.attach_disk(disk) == "slot0"
            assert await instance.attach_disk(scratch, writable=True) == "slot2"
            await instance.detach_disk("slot2")
            assert await inside(instance) == {"slot0": 4096, "slot1": NONE, "slot2": NONE}
            await instance.detach_disk("slot0")
            counts.append(len(descriptors(instance.record.pid)))
            assert await nodes(instance) == empty
        assert len(set(counts)) == 1
        assert str(disk) not in descriptors(instance.record.pid)
        assert await inside(instance) == {"slot0": NONE, "slot1": NONE, "slot2": NONE}


async def test_disks_that_are_put_in_at_once_are_not_mistaken_for_each_other(bench: Bench) -> None:
    """QEMU takes descriptors one after the other."""
    found: dict[str, int] = {}

    async def attach(path: Path) -> None:
        slot = await instance.attach_disk(path)
        assert slot not in found
        found[slot] = path.stat().st_size

    async with up(bench, disk_slots=12) as instance:
        paths = [bench.root / f"env-{number}" for number in range(8)]
        for number, path in enumerate(paths):
            path.write_bytes(bytes(512 * (number + 1)))
        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(attach, path)
        assert {name: size for name, size in (await inside(instance)).items() if size != NONE} == found
        assert sorted(found.values()) == [512 * (number + 1) for number in range(8)]
        held = descriptors(instance.record.pid)
        assert all(held.count(str(path)) == 1 for path in paths)


async def test_a_disk_whose_name_is_removed_stays(bench: Bench, disk: Path) -> None:
    async with up(bench) as instance:
        await instance.attach_disk(disk)
        disk.unlink()
        assert (await inside(instance))["slot0"] == 4096
        await instance.detach_disk("slot0")


async def held_by(instance: Instance) -> tuple[dict[str, int], set[str], list[str]]:
    """All that a disk that was not put in may have left in QEMU."""
    return await inside(instance), await nodes(instance), sorted(descriptors(instance.record.pid))


async def test_a_file_that_qemu_does_not_take_leaves_nothing_there(bench: Bench, disk: Path) -> None:
    async with up(bench, disk_slots=6) as instance:
        before = await held_by(instance)
        for _ in range(5):
            with pytest.raises(MachineLostError, match="QEMU refused blockdev-add"):
                await instance.attach_disk(bench.root)
        assert await held_by(instance) == before
        # No drive is lost with it: all that there were are there.
        assert [await instance.attach_disk(disk) for _ in range(4)] == ["slot0", "slot1", "slot3", "slot4"]


async def test_a_disk_that_the_drive_does_not_take_leaves_nothing_in_qemu(bench: Bench, disk: Path, scratch: Path) -> None:
    """QEMU locks what it writes to, and notices that when it puts it in (file-posix, `locking`)."""
    async with up(bench) as instance:
        await instance.attach_disk(disk)
        before = await held_by(instance)
        for _ in range(5):
            with pytest.raises(MachineLostError, match='QEMU refused qom-set: Failed to get "write" lock'):
                await instance.attach_disk(disk, writable=True)
        assert await held_by(instance) == before
        assert await instance.attach_disk(scratch, writable=True) == "slot2"
        assert instance.outcome is None


@pytest.mark.parametrize("step", ["_add", "_show"])
async def test_a_drive_is_free_again_when_whoever_wanted_it_was_cancelled(
    bench: Bench, disk: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with up(bench) as instance:
        before = await held_by(instance)
        done = getattr(Drives, step)
        for moment in ("before", "after"):
            scope = trio.CancelScope()

            async def cancelled(
                self: Drives, *given: Any, moment: str = moment, scope: trio.CancelScope = scope, **more: Any
            ) -> None:
                if scope.cancel_called:
                    await done(self, *given, **more)
                    return
                if moment == "after":
                    await done(self, *given, **more)
                scope.cancel()
                await trio.lowlevel.checkpoint()

            with monkeypatch.context() as patch, scope:
                patch.setattr(Drives, step, cancelled)
                await instance.attach_disk(disk)
            assert scope.cancelled_caught
            assert await held_by(instance) == before
        assert [await instance.attach_disk(disk), await instance.attach_disk(disk)] == ["slot0", "slot1"]


async def test_a_disk_for_a_machine_that_is_gone(bench: Bench, disk: Path) -> None:
    async with up(bench) as instance:
        await instance.attach_disk(disk)
        os.kill(instance.record.pid, signal.SIGKILL)
        with trio.fail_after(10):
            await instance.wait_ended()
        with pytest.raises(MachineLostError):
            await instance.attach_disk(disk)
        with pytest.raises(MachineLostError):
            await instance.detach_disk("slot0")
    assert str(disk) not in descriptors(os.getpid())


# Read the first sector of the second disk through the BIOS (int 0x13, function 0x42) and say its first byte, for ever.
_READ = b"\xbe\x88\x02\xb8\x00\x42\xb2\x81\xcd\x13\x31\xc0\x8e\xc0\x26\xa0\x00\x7c\xba\xf8\x03\xee\xeb\xe8"


async def test_the_guest_reads_what_is_in_the_drive(bench: Bench, disk: Path) -> None:
    code = _READ + bytes(0x20 - len(_READ)) + b"\x10\x00\x01\x00\x00\x7c\x00\x00" + bytes(8)
    async with bench.open(bench.plan(code)) as instance:
        with trio.fail_after(60):
            for letter in b"abc":
                disk.write_bytes(bytes([letter]) * 4096)
                slot = await instance.attach_disk(disk)
                await wait_for_console(instance, chr(letter))
                await instance.detach_disk(slot)


async def test_a_machine_that_is_found_again_has_nothing_in_its_drives(bench: Bench, disk: Path, scratch: Path) -> None:
    """The builds of the daemon that was killed are over."""
    async with up(bench) as instance:
        before = await held_by(instance)
        drives = Drives(instance._qmp, 3)
        for _ in range(2):
            # Of those one was put in, one was about to be.
            await drives.put_in(disk, writable=False)
            with scratch.open("r+b") as held:
                async with instance._qmp.handed_over(held.fileno()) as name:
                    file = {"driver": "file", "filename": name}
                    await instance._qmp.execute("blockdev-add", driver="raw", node_name="disk2", file=file)
            drives = Drives(instance._qmp, 3)
            await drives.clear()
            assert await held_by(instance) == before
        assert [await instance.attach_disk(disk) for _ in range(2)] == ["slot0", "slot1"]
