"""Clones that wait for builds: one that is started, and those of `warm: N` in a machine's file."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from offloadd.daemon.guests import Guests
from offloadd.daemon.host_memory import HostMemory
from offloadd.daemon.keeping import Kind
from offloadd.daemon.pool import Pool, WaitingClone, open_pool
from offloadd.daemon.workshop import open_workshop
from offloadd.model.machine import VmMachine
from offloadd.paths import Paths
from offloadd.place.vm import MOUNTED, open_in_guest
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.process import silent
from offloadd.unchanged import sign
from offloadd.vm.footprint import private_memory
from tests.conftest import World
from tests.vm.test_build import wait_for

# Of whatever date, they have the same CPU, and so the same template.
MACHINE = "cpu: Haswell\ncpu-count: 2\nmemory-size: 1024\nport-forwardings: {13422: 22}\nwarm: 1\n"
PLENTY = HostMemory(total=16 << 30, available=15 << 30, pressure=0.0)
STARTED_COST = 64 << 20
SHORT = HostMemory(total=16 << 30, available=15 << 30, pressure=80.0)


@pytest.fixture(scope="module")
def pooled(world: World) -> World:
    world.machine("pooled", MACHINE)
    world.recipe("dated", "steps: ['date +%F > day']\noutputs: [day]\n")
    return world


def build(world: World, date: str, out: Path) -> dict[str, Any]:
    """Build at that date; build.json."""
    world.run("build", "--machine", "pooled", "--date", date, "-o", out, world.root / "projects/dated")
    assert (out / "day").read_text() == f"{date}\n"
    found: dict[str, Any] = json.loads((out / "build.json").read_text())
    return found


def count_waits(world: World, kind: str = "warm") -> int:
    """How many clones of that kind have waited."""
    path = world.state / "offloadd.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum("'a clone waits'" in line and f"kind='{kind}'" in line for line in lines)


def test_builds_take_those_that_wait(pooled: World, tmp_path: Path) -> None:
    assert build(pooled, "2021-03-04", tmp_path / "first")["guest"] == "clone"
    wait_for(lambda: count_waits(pooled) == 1)
    first = set(pooled.waiting())
    assert len(first) == 2

    record = build(pooled, "2005-05-05", tmp_path / "second")
    assert (record["guest"], record["instance"]) == ("warm", f"build-{record['build']}")
    assert record["date"] == "2005-05-05T00:00:00Z"
    assert (pooled.state / "builds" / record["build"] / "console.log").exists()
    pooled.assert_nothing_left()

    # Nobody else gets it: another waits for the next build.
    wait_for(lambda: count_waits(pooled) == 2)
    assert len(first - set(pooled.waiting())) == 1
    assert build(pooled, "2011-11-11", tmp_path / "third")["guest"] == "warm"


def test_one_that_is_killed_does_no_harm(pooled: World, tmp_path: Path) -> None:
    before = count_waits(pooled)
    build(pooled, "2021-03-04", tmp_path / "before")
    wait_for(lambda: count_waits(pooled) > before)
    waiting = pooled.waiting()
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)

    assert build(pooled, "2012-12-12", tmp_path / "after")["guest"] == "clone"
    assert not set(waiting) & set(pooled.waiting())
    pooled.assert_nothing_left()


def test_none_outlives_its_daemon(pooled: World, make_world: Any, tmp_path: Path) -> None:
    world = make_world()
    world.machine("pooled", MACHINE)
    world.recipe("dated", "steps: ['date +%F > day']\noutputs: [day]\n")
    build(world, "2021-03-04", tmp_path / "first")
    wait_for(lambda: count_waits(world) == 1)
    (daemon,) = world.daemons()
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not world.daemons())
    assert len(world.waiting()) == 2

    # The next daemon finds it, and ends it.
    world.run("vm", "list")
    wait_for(lambda: not world.waiting())

    build(world, "2021-03-04", tmp_path / "second")
    wait_for(lambda: count_waits(world) == 2)
    world.run("daemon", "stop")
    wait_for(lambda: not world.daemons())
    assert not world.waiting()
    assert not list(world.instances.glob("*"))


@dataclass
class Bench:
    """A pool in this process, on a host whose memory is what a test says."""

    root: Path
    guests: Guests
    machine: VmMachine
    plan: VmPlan
    environment: Path
    memory: HostMemory = PLENTY
    began: int = 0

    def plan_for(self, name: str) -> VmPlan:
        return plan_for_build(self.plan, name, date=None, cpu=None, pinned_cpu=True)

    async def use(self, pool: Pool) -> str:
        """A build of nothing; where its guest came from."""
        self.began += 1
        plan = self.plan_for(f"build-{self.began}")
        async with pool.open(plan, self.machine, self.environment, silent, logs=self.root / "logs") as guest:
            return guest.origin

    def instances(self) -> list[Path]:
        return list(self.guests.shop.paths.instances.glob("*"))


@asynccontextmanager
async def open_bench(world: World) -> AsyncIterator[Bench]:
    root = world.root / "bench"
    config = world.root / "config/offload"
    paths = Paths(config=config, state=root / "state", cache=world.cache / "offload", runtime=root / "run")
    async with open_workshop(paths, paths.database) as shop:
        library = shop.library()
        machine = library.vm("pooled")
        environment = next((paths.cache / "environments").glob("*/root.squashfs"))
        yield Bench(root, Guests(shop), machine, await shop.plan(machine, library, silent), environment)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until_one_waits(pool: Pool, kind: Kind = "warm") -> WaitingClone:
    with trio.fail_after(120):
        while not (found := [clone for clone in pool.waiting() if clone.idle.kind == kind]):
            await trio.sleep(0.05)
    (clone,) = found
    return clone


async def test_they_are_given_up_when_memory_is_short(pooled: World) -> None:
    async with open_bench(pooled) as bench, open_pool(bench.guests, lambda: bench.memory) as pool:
        await bench.use(pool)
        clone = await until_one_waits(pool)
        record, templates = clone.instance.record, bench.guests.shop.templates
        assert (record.purpose, record.plan.machine, clone.idle.digest) == ("warm", "pooled", next(iter(templates._loaded)))
        assert private_memory(record.pid) is not None
        assert (private_memory(record.pid) or 0) < 110 << 20

        bench.memory = SHORT
        with trio.fail_after(60):
            await clone.ended.wait()
            while templates.is_loaded(clone.idle.digest):
                await trio.sleep(0.05)
        assert not pool.waiting()
        assert not bench.instances()
        # Builds go on without.
        assert await bench.use(pool) == "clone"


async def test_a_build_that_is_cancelled_ends_what_it_took(pooled: World) -> None:
    async with open_bench(pooled) as bench, open_pool(bench.guests, lambda: bench.memory) as pool:
        await bench.use(pool)
        clone = await until_one_waits(pool)
        before = descriptors()

        with trio.CancelScope() as scope:
            async with pool.open(
                bench.plan_for("build-c"), bench.machine, bench.environment, silent, logs=bench.root / "logs"
            ) as guest:
                assert (guest.origin, guest.instance.name, guest.agent.machine) == ("warm", "build-c", "build-c")
                assert abs(guest.instance.record.clock() - bench.plan.date.timestamp()) < 60
                assert (await guest.agent.call("clock"))["clock"] == pytest.approx(guest.instance.record.clock(), abs=5)
                bench.memory = SHORT  # or another is made meanwhile
                scope.cancel()
                await trio.sleep_forever()
        assert clone.ended.is_set()
        assert not [path for path in bench.instances() if not path.name.startswith("warm-")]
        with trio.fail_after(60):
            while bench.instances():
                await trio.sleep(0.05)
        assert descriptors() < before


async def test_what_waits_has_the_last_environment_mounted(pooled: World) -> None:
    async with open_bench(pooled) as bench, open_pool(bench.guests, lambda: bench.memory) as pool:
        await bench.use(pool)
        guest = (await until_one_waits(pool)).guest
        assert guest.mounted == sign([bench.environment])

        # It is taken with it; the next one waits without, as that disk is gone.
        bench.environment = bench.root / "gone.squashfs"
        opened = pool.open(bench.plan_for("build-m"), bench.machine, bench.environment, silent, logs=bench.root / "logs")
        async with opened as taken:
            assert (taken.instance, taken.mounted) == (guest.instance, guest.mounted)
            status, told = await taken.agent.run("/bin/sh", "-c", f"grep {MOUNTED} /proc/mounts && ls {MOUNTED}")
            assert status == 0
            assert b" squashfs ro," in told
            assert b"usr" in told.split()
        assert (await until_one_waits(pool)).guest.mounted == ()
        assert await bench.use(pool) == "warm"


async def test_what_waits_with_an_environment_that_was_made_anew(pooled: World) -> None:
    async with open_bench(pooled) as bench, open_pool(bench.guests, lambda: bench.memory) as pool:
        environment = bench.root / "root.squashfs"
        shutil.copyfile(bench.environment, environment)
        bench.environment = environment
        await bench.use(pool)
        await until_one_waits(pool)
        opened = pool.open(bench.plan_for("build-a"), bench.machine, environment, silent, logs=bench.root / "logs")
        async with opened as guest:
            shown = partial(open_in_guest, guest.instance, guest.agent, environment, own=True, mounted=guest.mounted)
            async with shown() as place:
                assert place.environment == MOUNTED
            shutil.copyfile(environment, bench.root / "anew")
            (bench.root / "anew").rename(environment)
            async with shown() as place:
                assert place.environment != MOUNTED


async def test_a_removed_image_or_template_ends_those_that_wait(pooled: World) -> None:
    async with open_bench(pooled) as bench, open_pool(bench.guests, lambda: bench.memory) as pool:
        await bench.use(pool)
        clone = await until_one_waits(pool)
        await pool.forget(images={"another"}, templates={"another"})
        assert clone in pool.waiting()
        await pool.forget(images={bench.plan.boot.digest})
        assert not pool.waiting()
        assert not bench.instances()

        await bench.use(pool)
        clone = await until_one_waits(pool)
        await pool.forget(templates={clone.idle.digest})
        assert not bench.instances()

        # Also while it is made.
        await bench.use(pool)
        with trio.fail_after(60):
            while not bench.instances():
                await trio.sleep(0.01)
        await pool.forget(templates={clone.idle.digest})
        assert not pool.waiting()
        assert not bench.instances()


async def test_a_build_takes_one_that_is_only_started(pooled: World) -> None:
    async with open_bench(pooled) as bench, open_pool(bench.guests, lambda: bench.memory) as pool:
        bench.machine = bench.machine.model_copy(update={"warm": 0})
        assert await bench.use(pool) == "clone"
        clone = await until_one_waits(pool, "started")
        assert pool.waiting() == [clone]
        record = clone.instance.record
        # It has not run, and QEMU's own memory is nearly all that it has.
        assert (record.purpose, record.began) == ("warm", 0)
        assert (private_memory(record.pid) or 0) < STARTED_COST

        opened = pool.open(bench.plan_for("build-s"), bench.machine, bench.environment, silent, logs=bench.root / "logs")
        async with opened as guest:
            assert (guest.instance, guest.instance.name, guest.origin) == (clone.instance, "build-s", "clone")
            assert guest.instance.record.purpose == "build"
            assert (await guest.agent.call("clock"))["clock"] == pytest.approx(guest.instance.record.clock(), abs=5)
            _, first = await guest.agent.run("/bin/cat", "/etc/machine-id", "/proc/sys/kernel/random/uuid")
            # The next one is started beside the build, and is another machine.
            assert await until_one_waits(pool, "started") != clone
            opened = pool.open(bench.plan_for("build-t"), bench.machine, bench.environment, silent, logs=bench.root / "logs")
            async with opened as other:
                _, second = await other.agent.run("/bin/cat", "/etc/machine-id", "/proc/sys/kernel/random/uuid")
                assert not set(first.split()) & set(second.split())
                assert [len(word) for word in second.split()] == [32, 36]
        assert clone.ended.is_set()
        assert not (bench.guests.shop.paths.instances / "build-s").exists()


async def test_one_that_is_started_and_dies_is_not_taken(pooled: World) -> None:
    async with open_bench(pooled) as bench, open_pool(bench.guests, lambda: bench.memory) as pool:
        bench.machine = bench.machine.model_copy(update={"warm": 0})
        await bench.use(pool)
        clone = await until_one_waits(pool, "started")
        # Nobody has noticed yet: the build does, and goes on with another.
        os.kill(clone.instance.record.pid, signal.SIGKILL)
        assert await bench.use(pool) == "clone"
        with trio.fail_after(10):
            await clone.ended.wait()
        assert clone not in pool.waiting()


async def test_they_end_with_the_pool(pooled: World) -> None:
    async with open_bench(pooled) as bench:
        async with open_pool(bench.guests, lambda: bench.memory) as pool:
            await bench.use(pool)
            await until_one_waits(pool)
        assert not bench.instances()
