"""Boots of our own QEMU: to lines on the console, and to the first command over the agent."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from bench.measure import BenchError
from bench.stock import Stock
from offloadd.guest.open import open_guest, personalize
from offloadd.plan.machine import VmPlan
from offloadd.vm.instance import Instance, open_instance

BOOT_LIMIT_S = 180.0
READY_LIMIT_S = 30.0
POLL_S = 0.005
FIRST = r"^offload-init: \d{4}-"


async def boot(stock: Stock, plan: VmPlan, lines: Sequence[str]) -> list[float]:
    """Boot once; when each line came, in seconds since before QEMU's start.

    Raises:
        BenchError: a line did not come.
    """
    began = trio.current_time()
    async with _opened(stock, plan) as instance:
        return [when - began for when in await _watch(instance.files.console_log, lines)]


async def boot_ours(stock: Stock) -> list[float]:
    """Boot our image once; when its first line came, and when its first command was done."""
    began = trio.current_time()
    async with _opened(stock, replace(stock.plan, instance="ours")) as instance:
        times = await _watch(instance.files.console_log, [FIRST])
        async with open_guest(instance, lambda text: None) as agent:
            await personalize(instance, agent)
            status, _ = await agent.run("/bin/true")
        if status:
            raise BenchError(f"`true` ended with status {status}")
        return [times[0] - began, trio.current_time() - began]


@asynccontextmanager
async def _opened(stock: Stock, plan: VmPlan) -> AsyncIterator[Instance]:
    shop = stock.shop
    with shop.cores.share(plan.cpu_count) as cores:
        opened = open_instance(
            plan, instances=shop.paths.instances, logs=stock.logs, bridge=shop.bridge, cores=cores, purpose="build"
        )
        async with opened as instance:
            yield instance


async def _watch(console: Path, lines: Sequence[str]) -> list[float]:
    """When each line appeared on the console, in their order."""
    patterns = [re.compile(line.encode(), re.MULTILINE) for line in lines]
    times: list[float] = []
    with trio.move_on_after(BOOT_LIMIT_S):
        while len(times) < len(patterns):
            if patterns[len(times)].search(_read(console)):
                times.append(trio.current_time())
            else:
                await trio.sleep(POLL_S)
        return times
    said = _read(console)[-2000:].decode(errors="replace")
    raise BenchError(f"no line {lines[len(times)]!r} on the console within {BOOT_LIMIT_S:.0f} s:\n{said}")


def _read(console: Path) -> bytes:
    return console.read_bytes().replace(b"\r", b"") if console.exists() else b""
