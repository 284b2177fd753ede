"""Boots of our own QEMU, timed by the lines on the console: of our image, and of a systemd image of the same Debian."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import trio

from bench.measure import BenchError
from bench.workplace import Workplace
from offloadd.daemon.workshop import Workshop
from offloadd.plan.machine import VmPlan
from offloadd.vm.instance import open_instance

BOOT_LIMIT_S = 180.0
POLL_S = 0.005
FIRST = r"^offload-init: \d{4}-"
OURS_READY = r"^offload-init: ready"


async def boot(shop: Workshop, place: Workplace, plan: VmPlan, lines: Sequence[str]) -> list[float]:
    """Boot once; when each line came, in seconds since before QEMU's start.

    Raises:
        BenchError: a line did not come.
    """
    with shop.cores.share(plan.cpu_count) as cores:
        began = trio.current_time()
        opened = open_instance(
            plan,
            instances=shop.paths.instances,
            logs=place.folder / "logs",
            bridge=shop.bridge,
            cores=cores,
            purpose="build",
        )
        async with opened as instance:
            return [when - began for when in await _watch(instance.files.console_log, lines)]


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
