"""From nothing to a guest that nobody has used before: ours and other ways, each against a systemd boot of the same Debian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import trio

from bench.boots import READY_LIMIT_S, boot, boot_ours
from bench.measure import BenchError, Budget, Row, Series
from bench.others import boot_debvm, boot_plain, boot_plain_command, boot_vng
from bench.program import time_to_end
from bench.stock import Stock, open_stock
from bench.systemd_image import READY
from bench.ways import Point, Way, go_in_turn, way_rows
from bench.workplace import Workplace
from offloadd.daemon.guests import FreshGuest
from offloadd.nursery import narrow
from offloadd.process import Progress
from offloadd.vm.footprint import private_memory


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
    footprints: list[int] = []
    async with open_stock(place, tell) as stock:
        tell("making the template", None)
        async with stock.open_clone("first"):
            pass
        ways = [*_our_ways(stock, base, footprints), *_other_ways(stock)]
        await go_in_turn(ways, budget, tell)
    facts = {
        "accelerator": stock.plan.qemu.accelerator,
        "qemu": stock.plan.qemu.version,
        "cpu": stock.plan.cpu,
        "cpu_count": str(stock.plan.cpu_count),
        "memory": f"{stock.plan.memory_mib} MiB",
        "private_memory_of_a_clone": f"{median(footprints) / 1e6:.0f} MB (target: at most 110 MB)",
        "image_digest": stock.ours.digest,
        "kernel": stock.ours.kernel_version,
    }
    return way_rows(ways, base, drawn=True), facts


def _our_ways(stock: Stock, base: Point, footprints: list[int]) -> list[Way]:
    systemd = replace(stock.plan, instance="systemd", boot=stock.systemd.boot)
    return [
        Way(
            name="our clone",
            points=(
                Point(
                    series=Series("our clone, a command"),
                    what="a clone that was started ahead, beside a build, to the end of its first command, over the agent",
                    target=1 / 40,
                    limit_s=0.25,
                ),
            ),
            go=partial(_next_clone, stock),
        ),
        Way(
            name="our first clone",
            points=(
                Point(
                    series=Series("our first clone, a command"),
                    what="a clone for which QEMU has to be started, to the end of its first command, over the agent",
                ),
                Point(
                    series=Series("our first clone, a command over SSH"),
                    what="the same clone given keys and sshd, to the end of `ssh true`",
                ),
            ),
            go=partial(_first_clone, stock, footprints),
        ),
        Way(
            name="our cold boot",
            points=(
                Point(series=Series("our cold boot, first line"), what="first line of our init", target=0.25),
                Point(
                    series=Series("our cold boot, a command"), what="our image to the end of its first command, over the agent"
                ),
            ),
            go=partial(boot_ours, stock),
        ),
        Way(name="systemd", points=(base,), go=partial(boot, stock, systemd, [READY])),
    ]


async def _next_clone(stock: Stock) -> Sequence[float]:
    await stock.until_one_is_started()
    began = trio.current_time()
    async with stock.open_next("next") as guest:
        return [await _command(guest) - began]


async def _first_clone(stock: Stock, footprints: list[int]) -> Sequence[float]:
    # Not beside the start of one.
    await stock.until_one_is_started()
    began = trio.current_time()
    async with stock.open_clone("clone") as guest:
        commanded = await _command(guest) - began
        if size := await trio.to_thread.run_sync(private_memory, guest.instance.record.pid):
            footprints.append(size)
        began_again = trio.current_time()
        login = await stock.admit(guest)
        await time_to_end([*login.ssh, "true"], limit_s=READY_LIMIT_S)
        return commanded, commanded + trio.current_time() - began_again


async def _command(guest: FreshGuest) -> float:
    """Run a command that does nothing; when it has ended."""
    status, _ = await guest.agent.run("/bin/true")
    if status:
        raise BenchError(f"`true` ended with status {status}")
    return trio.current_time()


def _other_ways(stock: Stock) -> list[Way]:
    plan, image = stock.plan, stock.systemd
    home = stock.folder / "vng"
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
