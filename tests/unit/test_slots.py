"""Slots are handed out in the order in which builds came."""

from __future__ import annotations

from functools import partial
from random import Random

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from offloadd.daemon.slots import Slots


async def _build(slots: Slots, name: str, machine: str, limit: int, ran: list[str], *, work: float = 1.0) -> None:
    with slots.ticket() as ticket:
        while not slots.may_take(ticket, machine, limit):
            await slots.wait(ticket)
        taken = slots.take(machine)
        taken.__enter__()
    ran.append(name)
    assert slots.busy(machine) <= limit
    await trio.sleep(work)
    taken.__exit__(None, None, None)


async def test_first_come_first_served(autojump_clock: trio.testing.MockClock) -> None:
    slots, ran = Slots(), list[str]()
    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(_build, slots, str(index), "local", 2, ran)
            await trio.testing.wait_all_tasks_blocked()
    assert ran == [str(index) for index in range(20)]
    assert slots.busy("local") == 0
    assert trio.current_time() < 60


async def test_one_that_goes_away_holds_nobody_up(autojump_clock: trio.testing.MockClock) -> None:
    slots, ran = Slots(), list[str]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_build, slots, "first", "local", 1, ran)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.1):
            await _build(slots, "impatient", "local", 1, ran)
        nursery.start_soon(_build, slots, "last", "local", 1, ran)
    assert ran == ["first", "last"]


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(0.1, 5)), max_size=40), st.integers(1, 4))
def test_all_run_and_no_machine_has_more_than_its_slots(builds: list[tuple[str, float]], limit: int) -> None:
    async def all_of_them() -> list[str]:
        slots, ran = Slots(), list[str]()
        async with trio.open_nursery() as nursery:
            for index, (machine, work) in enumerate(builds):
                nursery.start_soon(partial(_build, slots, str(index), machine, limit, ran, work=work))
        return ran

    ran = trio.run(all_of_them, clock=trio.testing.MockClock(autojump_threshold=0))
    assert sorted(ran) == sorted(str(index) for index in range(len(builds)))


LIMITS = {"a": 1, "b": 2, "c": 1}


class Crowd:
    """Builds that can go to several machines and change their minds about which of them is the best."""

    def __init__(self, chance: Random) -> None:
        self.slots = Slots()
        self.disliked = ""
        self.waiting: dict[int, frozenset[str]] = {}
        self._chance = chance

    async def build(self, name: int, able: frozenset[str]) -> None:
        slots = self.slots
        with slots.ticket() as ticket:
            self.waiting[name] = able
            while True:
                await trio.sleep(0.001 * self._chance.random())
                machine = min(able, key=lambda m: (m == self.disliked, slots.busy(m) >= LIMITS[m], m))
                if slots.may_take(ticket, machine, LIMITS[machine]):
                    break
                await slots.wait(ticket)
            del self.waiting[name]
            taken = slots.take(machine)
            taken.__enter__()
        await trio.sleep(self._chance.choice([0.3, 2, 7]))
        taken.__exit__(None, None, None)

    def idle(self) -> frozenset[str]:
        return frozenset(machine for machine, limit in LIMITS.items() if self.slots.busy(machine) < limit)

    async def watch(self) -> None:
        while True:
            await trio.sleep(0.5)
            disliked, idle = self.disliked, self.idle()
            await trio.sleep(0.1)
            if disliked == self.disliked:
                wanted = [able - {disliked} or able for able in self.waiting.values()]
                assert not any(idle & self.idle() & able for able in wanted)


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_no_slot_stays_free_that_somebody_would_take(chance: Random) -> None:
    async def all_of_them() -> None:
        crowd = Crowd(chance)
        async with trio.open_nursery() as watching:
            watching.start_soon(crowd.watch)
            with trio.fail_after(3000):
                async with trio.open_nursery() as nursery:
                    for name in range(25):
                        nursery.start_soon(crowd.build, name, frozenset(chance.sample("abc", chance.randint(1, 3))))
                        await trio.sleep(chance.random())
                        if chance.random() < 0.2:
                            crowd.disliked = chance.choice("abc")
                            crowd.slots.wake_all()
            watching.cancel_scope.cancel()

    trio.run(all_of_them, clock=trio.testing.MockClock(autojump_threshold=0))
