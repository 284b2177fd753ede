"""Trees of files into a running guest and out of it: `tar | ssh`, and what else carries them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from bench.fresh import Stock, open_stock
from bench.loads import Load, check_and_remove, make_big, make_small
from bench.login import Login, make_login
from bench.measure import Budget, Row, Series
from bench.program import time_to_end
from bench.ways import Point, Way, go_in_turn
from bench.workplace import Workplace
from offloadd.guest.open import open_guest
from offloadd.model.machine import SSH_PORT
from offloadd.nursery import narrow
from offloadd.process import Progress
from offloadd.vm.instance import Instance, open_instance

TRANSFER_LIMIT_S = 200.0
THERE = "/tmp/carried"  # noqa: S108 - in the guest
SIZES = {False: (1 << 30, 10_000), True: (64 << 20, 1_000)}
"""Bytes of the one file and number of the small ones, by whether it is to be quick."""


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """One way to carry trees."""

    name: str
    put: Callable[[Load], Awaitable[object]]
    """The load's folder becomes `THERE/<its name>` in the guest."""
    get: Callable[[Load, Path], Awaitable[object]]
    """That comes back below a directory on the host."""
    target: float | None = None
    """At most this much of the time that `tar | ssh` takes."""


def measure_throughput(place: Workplace, budget: Budget, tell: Progress, *, quick: bool) -> list[Row]:
    """The rows, each against `tar | ssh`."""
    try:
        return trio.run(_measure, place, budget, tell, quick)
    except BaseExceptionGroup as group:
        raise narrow(group) from None


async def _measure(place: Workplace, budget: Budget, tell: Progress, quick: bool) -> list[Row]:
    size, files = SIZES[quick]
    async with open_stock(place, tell) as stock, _open_machine(stock, place, tell) as (_, login):
        carriers = ssh_carriers(login)
        rows: list[Row] = []
        for make, amount, name in ((make_big, size, "big"), (make_small, files, "small")):
            load = await trio.to_thread.run_sync(make, place.folder / "loads" / name, amount)
            ways = [_way(carrier, load, login, place.folder) for carrier in carriers]
            await go_in_turn(ways, budget, tell)
            for carrier, way in zip(carriers[1:], ways[1:], strict=True):
                rows += carrier_rows(carrier, way, ways[0])
    return rows


def ssh_carriers(login: Login) -> list[Carrier]:
    """What everybody has; the first is what the others are compared with."""
    ssh = shlex.join(login.ssh)

    async def shell(script: str) -> None:
        await time_to_end(["sh", "-c", script], limit_s=TRANSFER_LIMIT_S)

    async def tar_put(load: Load) -> None:
        parent, name = shlex.quote(str(load.folder.parent)), load.folder.name
        await shell(f"tar -c -C {parent} {name} | {ssh} tar -x -C {THERE}")

    async def tar_get(load: Load, back: Path) -> None:
        await shell(f"{ssh} tar -c -C {THERE} {load.folder.name} | tar -x -C {shlex.quote(str(back))}")

    async def scp_put(load: Load) -> None:
        await time_to_end([*login.scp, str(load.folder), f"{login.remote}{THERE}"], limit_s=TRANSFER_LIMIT_S)

    async def scp_get(load: Load, back: Path) -> None:
        await time_to_end([*login.scp, f"{login.remote}{THERE}/{load.folder.name}", str(back)], limit_s=TRANSFER_LIMIT_S)

    return [Carrier(name="tar | ssh", put=tar_put, get=tar_get), Carrier(name="scp", put=scp_put, get=scp_get)]


def _way(carrier: Carrier, load: Load, login: Login, scratch: Path) -> Way:
    """There and back once, and nothing left on either side."""

    async def go() -> Sequence[float]:
        back = scratch / "back"
        back.mkdir()
        try:
            put_s = await _timed(carrier.put(load))
            get_s = await _timed(carrier.get(load, back))
            await trio.to_thread.run_sync(check_and_remove, load, back / load.folder.name)
        finally:
            await trio.to_thread.run_sync(shutil.rmtree, back)
        await time_to_end([*login.ssh, f"rm -r {THERE}/{load.folder.name}"], limit_s=TRANSFER_LIMIT_S)
        return put_s, get_s

    points = tuple(
        Point(series=Series(f"{direction} {load.name}, {carrier.name}"), what=f"{load.name} {direction}, {carrier.name}")
        for direction in ("into a guest", "out of a guest")
    )
    return Way(name=f"{load.name}, {carrier.name}", points=points, go=go, foreign=carrier.target is None)


async def _timed(work: Awaitable[object]) -> float:
    began = trio.current_time()
    await work
    return trio.current_time() - began


def carrier_rows(carrier: Carrier, ours: Way, base: Way) -> list[Row]:
    """There and back, against the base."""
    return [
        Row(
            name=point.series.name,
            compares=f"{point.what} : {reference.what}, the same guest",
            ours=point.series,
            base=reference.series,
            target=carrier.target,
            why_not=ours.why_not or base.why_not,
        )
        for point, reference in zip(ours.points, base.points, strict=True)
    ]


@asynccontextmanager
async def _open_machine(stock: Stock, place: Workplace, tell: Progress) -> AsyncIterator[tuple[Instance, Login]]:
    """A guest of our own that runs sshd, with a directory for what is carried."""
    plan = replace(stock.plan, instance="throughput")
    secrets = stock.shop.secrets(stock.machine)
    with stock.shop.cores.share(plan.cpu_count) as cores:
        opened = open_instance(
            plan,
            instances=stock.shop.paths.instances,
            logs=place.folder / "logs",
            bridge=stock.shop.bridge,
            cores=cores,
            purpose="build",
        )
        async with opened as instance, open_guest(instance, secrets, stock.shop.bridge, lambda text: tell(text, None)):
            machine = {
                "name": plan.machine,
                "ssh_port": instance.port(SSH_PORT),
                "client_key": str(secrets.client_key),
                "host_keys": [path.read_text() for path in secrets.host_keys],
            }
            login = make_login(machine, place.folder)
            await time_to_end([*login.ssh, f"mkdir {THERE}"], limit_s=TRANSFER_LIMIT_S)
            yield instance, login
