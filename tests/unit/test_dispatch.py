"""Who waits for a machine gets one as soon as there is one for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from offloadd.breaker import Breaker
from offloadd.config.library import Library
from offloadd.daemon.dispatch import Dispatcher
from offloadd.daemon.slots import Slots
from offloadd.daemon.survey import Survey
from offloadd.daemon.workshop import Workshop
from offloadd.errors import BootError, NoMachineError
from offloadd.model.kinds import KINDS
from offloadd.model.machine import LocalMachine, Machine
from offloadd.route import MachineFacts, Needs
from offloadd.store.database import Database, open_database

ON_TRIAL = Breaker(3, 1.0)


class Shop:
    """What the dispatcher needs of a workshop."""

    def __init__(self, database: Database, machines: Mapping[str, Machine]) -> None:
        self.database = database
        self._machines = machines

    def library(self) -> Library:
        return Library(machines=dict(self._machines), images={}, folders={})


class Looks:
    """A survey that takes a moment, in which others may be faster."""

    def __init__(self, database: Database, slots: Slots) -> None:
        self.loads: dict[str, float] = {}
        self.worth: Callable[[Machine], bool] = lambda machine: True
        self._database = database
        self._slots = slots

    async def facts(self, machines: Mapping[str, Machine], *, worth: Callable[..., bool]) -> dict[str, MachineFacts]:
        found = {name: self._facts(name) for name in machines}
        self.worth = worth
        await trio.sleep(0.001)
        return found

    def _facts(self, name: str) -> MachineFacts:
        database = self._database
        counts: dict[str, Any] = {"mode": database.machine_mode(name), "breaker": database.breaker(name)}
        busy = self._slots.busy(name)
        return MachineFacts(systems=("x86_64-linux",), running=True, busy=busy, load=self.loads.get(name), **counts)


class Farm:
    def __init__(self, database: Database, **slots: int) -> None:
        machines = {
            name: LocalMachine.model_validate(
                {"name": name, "kind": "local", "parallel-builds": count, "overload-threshold": 0.8}
            )
            for name, count in slots.items()
        }
        self.slots = Slots()
        self.looks = Looks(database, self.slots)
        self.dispatcher = Dispatcher(cast(Workshop, Shop(database, machines)), cast(Survey, self.looks), self.slots)
        self.ran: dict[str, str] = {}
        """Build -> machine."""
        self.waited_for: dict[str, list[str]] = {}

    async def build(
        self, name: str, work: float = 1.0, *, machine: str | None = None, without: Collection[str] = (), prefer: str = ""
    ) -> None:
        needs = Needs(system="x86_64-linux", name=name, machine=machine, prefer=(prefer,) if prefer else ())
        waiting = self.waited_for.setdefault(name, [])
        async with self.dispatcher.take(needs, without=without, waiting=waiting.append) as assignment:
            self.ran[name] = assignment.machine.name
            await trio.sleep(work)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(tmp_path / "db") as opened:
        yield opened


async def test_two_that_come_at_once_take_two_machines(database: Database, autojump_clock: trio.testing.MockClock) -> None:
    farm = Farm(database, a=1, b=1)
    async with trio.open_nursery() as nursery:
        for name in ("1", "2"):
            nursery.start_soon(farm.build, name)
    assert sorted(farm.ran.values()) == ["a", "b"]
    assert farm.waited_for == {"1": [], "2": []}


async def test_a_slot_that_the_first_in_line_may_not_have_goes_to_the_next(
    database: Database, autojump_clock: trio.testing.MockClock
) -> None:
    farm = Farm(database, a=1, b=1)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: farm.build("long", 1000, machine="a"))
        nursery.start_soon(lambda: farm.build("short", 10, machine="b"))
        await trio.sleep(1)
        nursery.start_soon(lambda: farm.build("pinned", 1, machine="a"))
        await trio.sleep(1)
        nursery.start_soon(lambda: farm.build("other", 1, prefer="a"))
        await trio.sleep(1)
        nursery.start_soon(lambda: farm.build("free", 1))
        await trio.sleep(20)
        assert "free" in farm.ran
        assert trio.current_time() - began < 30
        nursery.cancel_scope.cancel()


async def test_a_slot_is_not_lost_with_one_that_goes_elsewhere(
    database: Database, autojump_clock: trio.testing.MockClock
) -> None:
    farm = Farm(database, a=1, b=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: farm.build("on a", 10, machine="a"))
        nursery.start_soon(lambda: farm.build("on b", 1000, machine="b"))
        await trio.sleep(1)
        nursery.start_soon(lambda: farm.build("first", 1))
        await trio.sleep(1)
        nursery.start_soon(lambda: farm.build("second", 1, machine="a"))
        await trio.sleep(1)
        assert farm.waited_for == {"on a": [], "on b": [], "first": ["a slot on a"], "second": ["a slot on a"]}
        # When the slot is free the first in line would rather have the other machine, which is not.
        farm.looks.loads["a"] = 2.0
        await trio.sleep(20)
        assert "second" in farm.ran
        nursery.cancel_scope.cancel()


async def test_all_who_wait_for_a_trial_hear_of_its_end(database: Database, autojump_clock: trio.testing.MockClock) -> None:
    database.store_breaker("a", ON_TRIAL)
    farm = Farm(database, a=2, b=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: farm.build("long", 1000, machine="b"))
        nursery.start_soon(lambda: farm.build("trial", 10, machine="a"))
        await trio.sleep(1)
        nursery.start_soon(lambda: farm.build("pinned", 1, machine="b"))
        await trio.sleep(1)
        for name in ("1", "2", "3"):
            nursery.start_soon(partial(farm.build, name, 1, machine="a"))
        await trio.sleep(1)
        assert set(farm.ran) == {"long", "trial"}
        await trio.sleep(20)
        assert {"1", "2", "3"} <= set(farm.ran)
        nursery.cancel_scope.cancel()


async def test_a_trial_is_one_build(database: Database, autojump_clock: trio.testing.MockClock) -> None:
    database.store_breaker("a", ON_TRIAL)
    farm = Farm(database, a=3)
    async with trio.open_nursery() as nursery:
        for name in ("1", "2"):
            nursery.start_soon(farm.build, name, 10)
        await trio.sleep(5)
        assert len(farm.ran) == 1
        await trio.sleep(10)
        assert set(farm.ran) == {"1", "2"}


async def test_one_that_waits_for_a_machine_that_is_left_alone(
    database: Database, autojump_clock: trio.testing.MockClock
) -> None:
    database.store_breaker("a", Breaker(3, time.time() + 30))
    farm = Farm(database, a=1)
    began = trio.current_time()
    with trio.move_on_after(20):
        await farm.build("1")
    assert not farm.ran
    database.store_breaker("a", ON_TRIAL)
    await farm.build("2")
    assert trio.current_time() - began < 25


async def test_machine_faults_open_the_breaker(database: Database) -> None:
    farm = Farm(database, a=1)
    for _ in range(3):
        with pytest.raises(BootError):
            async with farm.dispatcher.take(Needs(system="x86_64-linux", name="n"), without=(), waiting=print):
                raise BootError("no", subject="a")
    assert database.breaker("a").failures == 3
    with pytest.raises(NoMachineError):
        (await farm.dispatcher.decide(Needs(system="x86_64-linux", name="n"))).best()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"tower"}),
        ({"system": "i586-gnu"}, {"kept"}),
        ({"system": "i586-gnu", "keep_machine": True}, {"kept", "thrown-away"}),
        ({"debian": True}, set()),
        ({"keep_machine": True}, set()),
        ({"machine": "tower", "system": "i586-gnu"}, {"tower"}),
        ({"machine": "thrown-away", "system": "i586-gnu"}, set()),
    ],
)
async def test_only_who_could_be_chosen_is_asked(database: Database, asked: dict[str, Any], expected: set[str]) -> None:
    remote = {"systems": ["x86_64-linux"], "host": "h", "host-key": "ssh-ed25519 AAAA", "private-key": "/k"}
    declared: list[dict[str, Any]] = [
        {"kind": "ssh", "name": "tower", **remote},
        {"kind": "childhurd", "name": "thrown-away", "image": "hurd-guix"},
        {"kind": "childhurd", "name": "kept", "image": "hurd-guix", "options": []},
    ]
    machines = {fields["name"]: KINDS[fields["kind"]].model_validate(fields) for fields in declared}
    slots = Slots()
    looks = Looks(database, slots)
    dispatcher = Dispatcher(cast(Workshop, Shop(database, machines)), cast(Survey, looks), slots)
    await dispatcher.decide(Needs(**{"system": "x86_64-linux", "name": "p", **asked}))
    assert {name for name, machine in machines.items() if looks.worth(machine)} == expected
