"""A command in a running guest, and trees of files into it and out of it: through the agent, disks, and OpenSSH."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from bench.carriers import THERE, Carrier, agent_carrier, disk_carrier, ssh_carriers
from bench.loads import Load, check_and_remove, make_big, make_small
from bench.login import Login
from bench.measure import Budget, Row, Series
from bench.program import time_to_end
from bench.stock import Stock, open_stock
from bench.ways import Point, Way, go_in_turn, way_rows
from bench.workplace import Workplace
from offloadd.daemon.guests import FreshGuest
from offloadd.nursery import narrow
from offloadd.process import Progress

WHOLE, SAMPLE = (1 << 30, 10_000), (64 << 20, 2_000)
"""Bytes of the one file, and number of the small ones: more than what goes in frames."""


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """A guest that is asked for everything here."""

    guest: FreshGuest
    login: Login
    scratch: Path


def measure_throughput(place: Workplace, budget: Budget, tell: Progress, *, quick: bool) -> list[Row]:
    """The rows, each against OpenSSH and the same guest."""
    try:
        return trio.run(_measure, place, budget, tell, quick)
    except BaseExceptionGroup as group:
        raise narrow(group) from None


async def _measure(place: Workplace, budget: Budget, tell: Progress, quick: bool) -> list[Row]:
    async with open_stock(place, tell) as stock, _open_machine(stock) as machine:
        rows = await _measure_commands(machine, tell)
        tar, scp = ssh_carriers(machine.login)
        agent = machine.guest.agent
        ours = [agent_carrier(agent), disk_carrier(machine.guest.instance, agent, machine.scratch)]
        carriers = [tar, *ours, scp]
        size, files = SAMPLE if quick else WHOLE
        for name, make in (("big", partial(make_big, size=size)), ("small", partial(make_small, files=files))):
            folder = place.folder / "loads" / name
            load = await trio.to_thread.run_sync(make, folder)
            ways = [_way(carrier, load, machine.scratch) for carrier in carriers]
            await go_in_turn(ways, budget, tell)
            for carrier, way in zip(carriers[1:], ways[1:], strict=True):
                rows += carrier_rows(way, ways[0], carrier.target if load.files == 1 else None)
            await trio.to_thread.run_sync(shutil.rmtree, folder)
    return rows


async def _measure_commands(machine: _Machine, tell: Progress) -> list[Row]:
    base = Point(series=Series("ssh true"), what="`ssh ... true` into the same guest")
    ours = Point(series=Series("a command over the agent"), what="`true` in a running guest over the agent")

    async def agent() -> Sequence[float]:
        return [await _timed(machine.guest.agent.run("/bin/true"))]

    async def ssh() -> Sequence[float]:
        return [await time_to_end([*machine.login.ssh, "true"], limit_s=30)]

    ways = [Way(name="the agent", points=(ours,), go=agent), Way(name="ssh", points=(base,), go=ssh)]
    await go_in_turn(ways, Budget(5, least=5, most=15), tell)
    return way_rows(ways, base, drawn=False)


def _way(carrier: Carrier, load: Load, scratch: Path) -> Way:
    """There and back once, and nothing left on either side."""

    async def go() -> Sequence[float]:
        back = scratch / "back"
        back.mkdir()
        try:
            put_s = await _timed(carrier.put(load))
            if carrier.settle is not None:
                await carrier.settle(load)
            get_s = await _timed(carrier.get(load, back))
            await trio.to_thread.run_sync(check_and_remove, load, back / load.folder.name)
        finally:
            await trio.to_thread.run_sync(shutil.rmtree, back)
        await carrier.clean(load)
        return put_s, get_s

    points = tuple(
        Point(series=Series(f"{load.name} {direction} a guest, {carrier.name}"), what=f"through {carrier.name}")
        for direction in ("into", "out of")
    )
    return Way(name=f"{load.name}, {carrier.name}", points=points, go=go, foreign=carrier.foreign)


async def _timed(work: Awaitable[object]) -> float:
    began = trio.current_time()
    await work
    return trio.current_time() - began


def carrier_rows(ours: Way, base: Way, target: float | None) -> list[Row]:
    """There and back, against the base."""
    return [
        Row(
            name=point.series.name,
            compares=f"{point.what} : {reference.what}, the same guest",
            ours=point.series,
            base=reference.series,
            target=target,
            why_not=ours.why_not or base.why_not,
        )
        for point, reference in zip(ours.points, base.points, strict=True)
    ]


@asynccontextmanager
async def _open_machine(stock: Stock) -> AsyncIterator[_Machine]:
    """A guest that runs sshd too, with a directory for what is carried."""
    scratch = stock.folder / "scratch"
    scratch.mkdir()
    async with stock.open_clone("throughput") as guest:
        login = await stock.admit(guest)
        await time_to_end([*login.ssh, f"mkdir {THERE}"], limit_s=30)
        yield _Machine(guest=guest, login=login, scratch=scratch)
