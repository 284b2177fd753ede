"""Slots are handed out in the order in which builds came."""

from __future__ import annotations

from functools import partial

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from offloadd.daemon.slots import Slots


async def _build(slots: Slots, name: str, machine: str, limit: int, ran: list[str], *, work: float = 1.0) -> None:
    with slots.ticket() as ticket:
        while not slots.may_take(ticket, machine, limit):
            await ticket.wait()
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
