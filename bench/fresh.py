"""From nothing to a guest that nobody has used before: ours and other ways, each against a systemd boot of the same Debian."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import trio

from bench.boots import FIRST, OURS_READY, boot
from bench.measure import Budget, Row, Series
from bench.others import boot_debvm, boot_plain, boot_plain_command, boot_vng
from bench.systemd_image import READY, SystemdImage, ensure_systemd_image
from bench.ways import Point, Way, go_in_turn, way_rows
from bench.workplace import MACHINE, Workplace
from offloadd.daemon.workshop import Workshop, open_workshop
from offloadd.model.machine import VmMachine
from offloadd.nursery import narrow
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What can be booted in this process, without a daemon."""

    shop: Workshop
    machine: VmMachine
    plan: VmPlan
    """Our image, with free ports."""
    image: SystemdImage


@asynccontextmanager
async def open_stock(place: Workplace, tell: Progress) -> AsyncIterator[Stock]:
    """Make the images, when there are none yet."""
    async with open_workshop(place.paths, place.paths.state / "bench.sqlite") as shop:
        library = shop.library()
        machine = library.vm(MACHINE)
        plan = await shop.plan(machine, library, tell)
        plan = replace(plan, instance="ours", forwards=tuple((0, guest) for _, guest in plan.forwards))
        image = await ensure_systemd_image(await shop.image(library, machine.image, tell), place.paths, tell)
        yield Stock(shop=shop, machine=machine, plan=plan, image=image)


def measure_fresh(place: Workplace, budget: Budget, tell: Progress) -> tuple[list[Row], dict[str, str]]:
    """The rows, and facts about what was booted."""
    try:
        return trio.run(_measure, place, budget, tell)
    except BaseExceptionGroup as group:
        raise narrow(group) from None


async def _measure(place: Workplace, budget: Budget, tell: Progress) -> tuple[list[Row], dict[str, str]]:
    base = Point(
        series=Series("systemd, finished"),
        what="a systemd boot of the same Debian (same QEMU options, kernel and packages) to the end of multi-user.target",
    )
    async with open_stock(place, tell) as stock:
        ways = [*_our_ways(stock, place, base), *_other_ways(stock, place)]
        await go_in_turn(ways, budget, tell)
        image = await stock.shop.image(stock.shop.library(), stock.machine.image, tell)
    facts = {
        "accelerator": stock.plan.qemu.accelerator,
        "qemu": stock.plan.qemu.version,
        "cpu": stock.plan.cpu,
        "cpu_count": str(stock.plan.cpu_count),
        "memory": f"{stock.plan.memory_mib} MiB",
        "image_digest": image.digest,
        "kernel": image.kernel_version,
    }
    return way_rows(ways, base), facts


def _our_ways(stock: Stock, place: Workplace, base: Point) -> list[Way]:
    systemd = replace(stock.plan, instance="systemd", boot=stock.image.boot)
    return [
        Way(
            name="our cold boot",
            points=(
                Point(series=Series("our cold boot, first line"), what="first line of our init", target=0.25),
                Point(series=Series("our cold boot, ready"), what="our init has set everything up"),
            ),
            go=partial(boot, stock.shop, place, stock.plan, [FIRST, OURS_READY]),
        ),
        Way(name="systemd", points=(base,), go=partial(boot, stock.shop, place, systemd, [READY])),
    ]


def _other_ways(stock: Stock, place: Workplace) -> list[Way]:
    plan, image = stock.plan, stock.image
    home = place.folder / "vng"
    home.mkdir()

    def point(name: str, what: str) -> tuple[Point]:
        return (Point(series=Series(name), what=what),)

    return [
        Way(
            name="plain QEMU",
            points=point(
                "plain QEMU, our init", "`qemu -snapshot` of our disk, kernel and initramfs to the first line of our init"
            ),
            go=partial(boot_plain, plan),
        ),
        Way(
            name="plain QEMU, a command",
            points=point(
                "plain QEMU, a command", "`qemu -snapshot` of the systemd disk, a command of the shell instead of an init"
            ),
            go=partial(boot_plain_command, plan, image),
        ),
        Way(
            name="debvm-run",
            points=point("debvm-run, systemd finished", "`debvm-run -- -snapshot` of the systemd disk to the same line"),
            go=partial(boot_debvm, plan, image),
            foreign=True,
        ),
        Way(
            name="virtme-ng",
            points=point(
                "virtme-ng, a command",
                "`vng --exec` of a command on the systemd disk, Debian's full kernel of the same version (9p)",
            ),
            go=partial(boot_vng, plan, image, home),
            foreign=True,
        ),
    ]
