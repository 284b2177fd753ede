"""Which machine a build daemon's build gets; machines that are started for it are stopped when nobody needs them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from offloadd.daemon import offload
from offloadd.daemon.offload import ASKED_AGAIN_S, Offloading, Verdict, judge
from offloadd.daemon.slots import Slots
from offloadd.errors import BootError, HostError, NotFoundError
from offloadd.model.machine import BuildVm
from offloadd.model.offer import Offer, OfferState
from offloadd.model.offload import OffloadRequest
from offloadd.store.database import Database, open_database

GUIX = OffloadRequest(daemon="guix", system="x86_64-linux", features=(), local=True)
NIX = OffloadRequest(daemon="nix", system="x86_64-linux", features=(), local=True)
IDLE_S = 100.0


def an_offer(machine: str, state: OfferState = "running", **values: Any) -> Offer:
    default: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 22,
        "user": "offloading",
        "host_key": "ssh-ed25519 AAAA",
        "private_key": "/key",
        "systems": ("x86_64-linux",),
        "parallel_builds": 1,
        "speed": 1.0,
        "features": (),
        "overload_threshold": None,
        "daemons": ("guix", "nix"),
    }
    return Offer(machine=machine, state=state, **{**default, **values})


def taken(*names: str) -> Any:
    return lambda machine: names.count(machine)


def test_what_nobody_builds_is_declined() -> None:
    others = [
        an_offer("other-system", systems=("i686-linux",)),
        an_offer("other-daemon", daemons=("nix",)),
        an_offer("broken", "stopped"),
    ]
    verdict = judge(GUIX, [an_offer("mended", "running")], taken(), {"mended"})
    assert verdict.take is not None
    verdict = judge(GUIX, others, taken(), {"broken"})
    assert (verdict.take, verdict.start, verdict.postpone) == (None, None, False)
    assert "broken does not start" in verdict.why
    wants_kvm = GUIX.model_copy(update={"features": ("kvm",)})
    assert not judge(wants_kvm, [an_offer("plain", features=("big",))], taken()).postpone


def test_running_ones_come_first_then_the_fastest() -> None:
    offered = [an_offer("fast-but-off", "stopped", speed=9.0), an_offer("slow"), an_offer("fast", speed=2.0)]
    assert judge(GUIX, offered, taken()).take == offered[2]
    assert judge(GUIX, offered, taken("fast")).take == offered[1]
    assert judge(GUIX, offered, taken("fast", "slow")).start == offered[0]


def test_one_that_starts_is_waited_for() -> None:
    offered = [an_offer("off", "stopped"), an_offer("coming", "starting")]
    assert judge(GUIX, offered, taken()) == Verdict(postpone=True, why="coming is starting")


@pytest.mark.parametrize(("request_", "postponed"), [(GUIX, True), (NIX, False)])
def test_when_all_are_busy_each_build_daemon_has_its_habit(request_: OffloadRequest, postponed: bool) -> None:
    assert judge(request_, [an_offer("one")], taken("one")).postpone is postponed
    here = request_.model_copy(update={"local": False})
    assert judge(here, [an_offer("one")], taken("one")).postpone


@given(
    st.lists(
        st.builds(
            an_offer,
            st.sampled_from("abcdef"),
            st.sampled_from(["running", "starting", "stopped"]),
            speed=st.sampled_from([0.5, 1.0, 2.0]),
            parallel_builds=st.integers(1, 3),
            systems=st.sampled_from([("x86_64-linux",), ("i686-linux",)]),
        ),
        unique_by=lambda offer: offer.machine,
        max_size=6,
    ),
    st.lists(st.sampled_from("abcdef"), max_size=12),
    st.booleans(),
)
def test_whatever_is_offered(offered: list[Offer], busy: list[str], local: bool) -> None:
    request = GUIX.model_copy(update={"local": local})
    verdict = judge(request, offered, busy.count)
    if verdict.take:
        assert verdict.take.state == "running"
        assert busy.count(verdict.take.machine) < verdict.take.parallel_builds
        assert not verdict.postpone
    if verdict.start:
        assert verdict.postpone
        assert verdict.start.state == "stopped"
    for offer in filter(None, (verdict.take, verdict.start)):
        assert "x86_64-linux" in offer.systems
    assert verdict == judge(request, list(reversed(offered)), busy.count)
    assert bool(verdict.take or verdict.postpone) == any("x86_64-linux" in offer.systems for offer in offered)


class FakeMachines:
    """Machines that boot in a minute."""

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}
        self.starts = 0
        self.fails = False
        self.idle_timeout = IDLE_S
        self.stop_s = 0.0

    async def start(self, name: str) -> Any:
        if name not in self.running:
            self.starts += 1
            machine = BuildVm(kind="build-vm", name=name, image="debian", idle_timeout=self.idle_timeout, daemons=("guix",))
            self.running[name] = SimpleNamespace(ended=trio.Event(), declared=machine)
            await trio.sleep(60)
            if self.fails:
                del self.running[name]
                raise BootError("not ready", subject=name)
        return self.running[name]

    async def stop(self, name: str) -> None:
        if name not in self.running:
            raise NotFoundError("does not run", subject=name)
        await trio.sleep(self.stop_s)
        self.running.pop(name).ended.set()

    def names(self) -> Collection[str]:
        return self.running.keys()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(tmp_path / "offload.sqlite") as opened:
        yield opened


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> FakeMachines:
    made = FakeMachines()

    async def offers(*_: object) -> list[Offer]:
        return [an_offer("vm", "running" if "vm" in made.running else "stopped", parallel_builds=2)]

    monkeypatch.setattr(offload, "offers", offers)
    return made


@asynccontextmanager
async def open_offloading(tmp_path: Path, database: Database, machines: FakeMachines) -> AsyncIterator[Offloading]:
    shop = SimpleNamespace(database=database, paths=SimpleNamespace(state=tmp_path))
    async with trio.open_nursery() as nursery:
        yield Offloading(cast("Any", shop), cast("Any", machines), Slots(), nursery)
        nursery.cancel_scope.cancel()


async def test_started_on_demand_and_stopped_when_idle(
    tmp_path: Path, database: Database, machines: FakeMachines, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_offloading(tmp_path, database, machines) as offloading:
        for _ in range(3):
            await offloading.decide(GUIX)
        await trio.testing.wait_all_tasks_blocked()
        assert machines.starts == 1
        await trio.sleep(60 + IDLE_S - 1)
        with offloading.lease("vm"):
            await trio.sleep(10 * IDLE_S)
            with offloading.lease("vm"):
                assert len(offloading) == 2
            await trio.sleep(10 * IDLE_S)
            assert "vm" in machines.running
        assert len(offloading) == 0
        await trio.sleep(IDLE_S - 1)
        assert "vm" in machines.running
        await trio.sleep(2)
        assert not machines.running
        assert not list((tmp_path / "on-demand").iterdir())
        # And again.
        await offloading.decide(GUIX)
        await trio.sleep(1)
        assert machines.starts == 2


async def test_who_was_told_to_wait_has_the_time_to_ask_again(
    tmp_path: Path, database: Database, machines: FakeMachines, autojump_clock: trio.testing.MockClock
) -> None:
    machines.idle_timeout = 2.0
    async with open_offloading(tmp_path, database, machines) as offloading:
        await offloading.decide(GUIX)
        await trio.sleep(60 + ASKED_AGAIN_S - 1)
        verdict = await offloading.decide(GUIX)
        assert verdict.take is not None
        with offloading.lease("vm"):
            await trio.sleep(10)
        await trio.sleep(1)
        assert "vm" in machines.running
        await trio.sleep(2)
        assert not machines.running


async def test_one_that_is_just_being_stopped_is_nobodys(
    tmp_path: Path, database: Database, machines: FakeMachines, autojump_clock: trio.testing.MockClock
) -> None:
    machines.stop_s = 5.0
    async with open_offloading(tmp_path, database, machines) as offloading:
        await offloading.decide(GUIX)
        await trio.sleep(60 + IDLE_S + 1)
        verdict = await offloading.decide(GUIX)
        assert (verdict.take, verdict.postpone, machines.starts) == (None, True, 1)
        await trio.sleep(5)
        assert (await offloading.decide(GUIX)).start is not None
        await trio.sleep(1)
        assert machines.starts == 2


async def test_what_its_user_starts_is_his(
    tmp_path: Path, database: Database, machines: FakeMachines, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_offloading(tmp_path, database, machines) as offloading:
        await offloading.decide(GUIX)
        await trio.sleep(70)
        offloading.leave_to_user("vm")
        with offloading.lease("vm"):
            await trio.sleep(1)
        await trio.sleep(10 * IDLE_S)
        assert "vm" in machines.running


async def test_the_next_daemon_goes_on_minding(
    tmp_path: Path, database: Database, machines: FakeMachines, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_offloading(tmp_path, database, machines) as offloading:
        await offloading.decide(GUIX)
        await trio.sleep(70)
    (tmp_path / "on-demand/gone").touch()
    kept = sorted(tmp_path.iterdir())
    async with open_offloading(tmp_path, database, machines) as offloading:
        offloading.resume()
        assert [mark.name for mark in (tmp_path / "on-demand").iterdir()] == ["vm"]
        assert sorted(tmp_path.iterdir()) == kept
        await trio.sleep(IDLE_S + 1)
        assert not machines.running


async def test_one_that_does_not_start_is_left_alone(
    tmp_path: Path, database: Database, machines: FakeMachines, autojump_clock: trio.testing.MockClock
) -> None:
    machines.fails = True
    async with open_offloading(tmp_path, database, machines) as offloading:
        for _ in range(20):
            verdict = await offloading.decide(GUIX)
            if not verdict.postpone:
                break
            await trio.sleep(61)
        assert "does not start" in verdict.why
        assert machines.starts < 10


async def test_what_its_user_starts_while_it_is_stopped_is_stopped_first(
    tmp_path: Path, database: Database, machines: FakeMachines, autojump_clock: trio.testing.MockClock
) -> None:
    """To give up in the middle would leave it running and half stopped."""
    machines.stop_s = 5.0
    async with open_offloading(tmp_path, database, machines) as offloading:
        await offloading.decide(GUIX)
        await trio.sleep(60 + IDLE_S + 1)
        offloading.leave_to_user("vm")
        await trio.sleep(5)
        assert not machines.running
        assert not list((tmp_path / "on-demand").iterdir())


@pytest.mark.parametrize("fails", [True, False])
async def test_a_full_disk_ends_nothing(
    tmp_path: Path,
    database: Database,
    machines: FakeMachines,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise HostError("the disk is full")

    machines.fails = fails
    async with open_offloading(tmp_path, database, machines) as offloading:
        database.store_breaker("vm", database.breaker("vm").after_failure(0.0))
        monkeypatch.setattr(database, "store_breaker", full)
        await offloading.decide(GUIX)
        await trio.sleep(70)
        # Who would be ended with it.
        await trio.lowlevel.checkpoint()
        assert ("vm" in machines.running) != fails
