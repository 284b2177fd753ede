"""A guest that is saved, and those that go on from there; without a system in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from offloadd.errors import BootError, ImageError, MachineLostError
from offloadd.plan.machine import VmPlan
from offloadd.vm.instance import Instance
from offloadd.vm.memory import SavedGuest, Saving, open_memory, read_memory, seal_memory
from offloadd.vm.record import read_record

from .bare_qemu import Bench, descriptors, say, wait_for_console

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86 is not installed")

_UP = say(b"up ")
_PLACE = (0x268 + len(_UP) + 22).to_bytes(2, "little")
# For each byte that comes on the serial port: add one to a byte in memory, which is an @ at first, and say it.
_WAIT = b"\xba\xfd\x03\xec\xa8\x01\x74\xf8"
_ADD = b"\xba\xf8\x03\xec\xfe\x06" + _PLACE + b"\xa0" + _PLACE + b"\xee\xeb\xea"
COUNT = _UP + _WAIT + _ADD + b"@"


async def press(instance: Instance, said: str) -> None:
    """Send a byte, and wait until this is all that the guest has said since it is this instance."""
    async with await trio.open_unix_socket(str(instance.files.console)) as console:
        await console.send_all(b"x")
        await wait_for_console(instance, said)
    assert instance.console_tail() == said


async def disk(instance: Instance, command: str) -> str:
    """Do something with its disk, without the guest; what is said about it."""
    log = instance.files.qemu_log
    before = log.stat().st_size
    blocks = await instance._qmp.execute("query-block")
    [device] = [block["qdev"] for block in blocks if block["inserted"]["node-name"] == "root"]
    await instance._qmp.human(f'qemu-io -d {device} "{command}"')
    return log.read_bytes()[before:].decode()


async def save(bench: Bench, plan: VmPlan) -> SavedGuest:
    """A guest that has counted to A and written to its disk."""
    async with AsyncExitStack() as stack:
        ram, state = open_memory("ram", plan.memory_mib << 20), open_memory("state")
        stack.callback(os.close, ram)
        stack.callback(os.close, state)
        async with bench.open(plan, memory=Saving(ram=ram)) as instance:
            await wait_for_console(instance, "up")
            await press(instance, "up A")
            await disk(instance, "write -P 7 0 64k")
            await instance.save(state)
            await instance.stop(polite_s=0)
            frozen = read_memory(instance.files.disk)
            stack.callback(os.close, frozen)
        for fd in (ram, state, frozen):
            seal_memory(fd)
        stack.pop_all()
    return SavedGuest(digest="d", ram=ram, state=state, frozen=frozen)


@pytest.fixture
async def saved(bench: Bench) -> AsyncIterator[SavedGuest]:
    made = await save(bench, bench.plan(COUNT, "saved"))
    yield made
    for fd in (made.ram, made.state, made.frozen):
        os.close(fd)
    bench.assert_nothing_left()


def clone(bench: Bench, number: int) -> VmPlan:
    return bench.plan(COUNT, f"clone-{number}")


async def test_clones_go_on_from_there_and_know_nothing_of_each_other(bench: Bench, saved: SavedGuest) -> None:
    before = os.pread(saved.ram, 128 << 20, 0), os.pread(saved.frozen, 8 << 20, 0)
    async with bench.open(clone(bench, 1), memory=saved) as one, bench.open(clone(bench, 2), memory=saved) as two:
        assert (one.console_tail(), two.console_tail()) == ("", "")
        await press(one, "B")
        await press(one, "BC")
        await press(two, "B")
        assert "failed" not in await disk(one, "read -P 7 0 64k")
        await disk(one, "write -P 8 0 64k")
        assert "failed" in await disk(one, "read -P 7 0 64k")
        assert "failed" not in await disk(two, "read -P 7 0 64k")
    async with bench.open(clone(bench, 3), memory=saved) as three:
        await press(three, "B")
        assert "failed" not in await disk(three, "read -P 7 0 64k")
    assert (os.pread(saved.ram, 128 << 20, 0), os.pread(saved.frozen, 8 << 20, 0)) == before


async def test_a_clone_that_is_paused_stands_still(bench: Bench, saved: SavedGuest) -> None:
    async with bench.open(clone(bench, 1), memory=saved) as instance:
        await instance.pause()
        assert (await instance._qmp.execute("query-status"))["status"] == "paused"
        await instance.resume()
        await press(instance, "B")


async def test_a_clone_that_is_only_started_goes_on_as_another(bench: Bench, saved: SavedGuest) -> None:
    async with bench.open_paused(clone(bench, 1), saved) as instance:
        await instance.take_over(saved)
        # Whoever finds it knows that nothing has run in it.
        assert instance.record.began == 0
        found = read_record(instance.files.record)
        assert found is not None
        assert (found.pid, found.purpose, found.began) == (instance.record.pid, "warm", 0)
        await instance.hand_over(replace(instance.record.plan, instance="taker"), "build", bench.logs)
        assert (instance.name, instance.record.purpose) == ("taker", "build")
        assert instance.record.began
        await press(instance, "B")


@pytest.mark.parametrize("loaded", [True, False])
async def test_a_clone_that_never_ran_leaves_nothing(bench: Bench, saved: SavedGuest, loaded: bool) -> None:
    before = descriptors(os.getpid())
    async with bench.open_paused(clone(bench, 1), saved) as instance:
        if loaded:
            await instance.take_over(saved)
    assert instance.outcome is not None
    assert instance.outcome.exit_status == 0
    assert descriptors(os.getpid()) == before
    bench.assert_nothing_left()


async def test_a_clone_has_drives(bench: Bench, saved: SavedGuest) -> None:
    path = bench.root / "env"
    path.write_bytes(bytes(4096))
    async with bench.open(clone(bench, 1), memory=saved) as instance:
        assert await instance.attach_disk(path) == "slot0"
        await instance.detach_disk("slot0")


async def test_a_clone_has_its_own_ports(bench: Bench, saved: SavedGuest) -> None:
    async with bench.open(clone(bench, 1), memory=saved) as one, bench.open(clone(bench, 2), memory=saved) as two:
        assert not set(one.record.ports.values()) & set(two.record.ports.values())


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5])
async def test_a_state_that_is_none(bench: Bench, saved: SavedGuest, kept: float) -> None:
    whole = os.pread(saved.state, 8 << 20, 0)
    part = whole[: int(len(whole) * kept)]
    state = open_memory("state")
    try:
        os.pwrite(state, part or os.urandom(1000), 0)
        with pytest.raises((BootError, MachineLostError)), trio.fail_after(20):
            async with bench.open(clone(bench, 1), memory=replace(saved, state=state)):
                pytest.fail("it goes on from nothing")
    finally:
        os.close(state)
    bench.assert_nothing_left()


@pytest.mark.parametrize("change", [{"cpu_count": 1}, {"memory_mib": 64}])
async def test_another_machine_than_was_saved(bench: Bench, saved: SavedGuest, change: dict[str, object]) -> None:
    """The key of a template keeps that from happening; if it does, it is told at once."""
    with pytest.raises((BootError, MachineLostError)), trio.fail_after(20):
        async with bench.open(replace(clone(bench, 1), **change), memory=saved):  # type: ignore[arg-type]
            pytest.fail("it goes on as another machine")
    bench.assert_nothing_left()


async def test_a_clone_that_is_cancelled_leaves_nothing_at_any_moment(bench: Bench, saved: SavedGuest) -> None:
    async def open_for(delay: float) -> None:
        with trio.move_on_after(delay):
            async with bench.open(clone(bench, 1), memory=saved):
                await trio.sleep_forever()

    await open_for(0.0)
    before = sorted(descriptors(os.getpid()))
    for delay in (0.0, 0.01, 0.03, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3):
        await open_for(delay)
        bench.assert_nothing_left()
    assert sorted(descriptors(os.getpid())) == before


# NVMe's state cannot be saved (QEMU 7.2: hw/nvme/ctrl.c, `unmigratable`).
NVME = ("-blockdev", "driver=null-co,node-name=n0", "-device", "nvme,serial=n0,drive=n0")


async def test_a_device_that_cannot_be_saved(bench: Bench) -> None:
    plan = replace(bench.plan(COUNT, "saved"), options=NVME)
    before = sorted(descriptors(os.getpid()))
    with pytest.raises(MachineLostError, match=r"nvme"):
        await save(bench, plan)
    bench.assert_nothing_left()
    assert sorted(descriptors(os.getpid())) == before


async def test_what_is_saved_must_have_ended_to_be_sealed(bench: Bench) -> None:
    """Nobody writes to what clones stand on."""
    plan = bench.plan(COUNT, "saved")
    ram = open_memory("ram", plan.memory_mib << 20)
    try:
        async with bench.open(plan, memory=Saving(ram=ram)) as instance:
            await wait_for_console(instance, "up")
            with pytest.raises(OSError, match="busy"):
                seal_memory(ram)
        seal_memory(ram)
    finally:
        os.close(ram)


async def test_the_memory_of_clones_is_shared(bench: Bench, saved: SavedGuest) -> None:
    """All but what each has written: a bare guest has touched a few pages of the BIOS's."""
    async with bench.open(clone(bench, 1), memory=saved) as instance:
        await press(instance, "B")
        [mapping] = [part for part in memory_of(instance.record.pid) if "memfd:ram" in part]
        private = sum(int(line.split()[1]) for line in mapping.splitlines() if line.startswith("Private_Dirty:"))
        assert private < 1024


def memory_of(pid: int) -> list[str]:
    """proc(5), /proc/PID/smaps: one text for each mapping."""
    parts: list[str] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            parts[-1] += f"\n{line}"
        else:
            parts.append(line)
    return parts


async def test_none_goes_on_above_a_disk_that_was_made_anew(bench: Bench, saved: SavedGuest) -> None:
    plan = clone(bench, 1)
    made = bench.root / "made"
    made.write_bytes(plan.boot.disk.read_bytes())
    made.rename(plan.boot.disk)
    with pytest.raises(ImageError, match=r"^clone-1: its image was made anew in the meantime$"):
        async with bench.open_paused(plan, saved):
            pass
    ram = open_memory("ram", plan.memory_mib << 20)
    try:
        with pytest.raises(ImageError, match="made anew"):
            async with bench.open_paused(plan, Saving(ram=ram)):
                pass
    finally:
        os.close(ram)
    # To boot from it is no mistake.
    async with bench.open(plan) as instance:
        await wait_for_console(instance, "up")
