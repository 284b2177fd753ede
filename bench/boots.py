"""Cold boots: our image against a systemd boot of the same Debian, by the same code, in turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from bench.measure import BenchError, Budget, Row, Series, in_turn
from bench.systemd_image import READY, ensure_systemd_image
from bench.workplace import MACHINE, Workplace
from offloadd.daemon.workshop import Workshop, open_workshop
from offloadd.guest.secret_service import deliver_secrets
from offloadd.model.machine import SECRETS_PORT
from offloadd.nursery import narrow
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress
from offloadd.vm.instance import open_instance

BOOT_LIMIT_S = 180.0
POLL_S = 0.005
FIRST = re.compile(rb"^offload-init: \d{4}-", re.MULTILINE)
SECRETS = re.compile(rb"^offload-init: secrets installed", re.MULTILINE)
OURS_READY = re.compile(rb"^offload-init: ready", re.MULTILINE)
SYSTEMD_READY = re.compile(READY.encode())


@dataclass(frozen=True, kw_only=True)
class _Boot:
    """One way to boot: the plan, and the console's lines that are timed."""

    plan: VmPlan
    lines: dict[Series, re.Pattern[bytes]]
    secrets: Path | None = None


def measure_boots(place: Workplace, budget: Budget, tell: Progress) -> tuple[list[Row], dict[str, str]]:
    """The rows, and facts about what was booted."""
    try:
        return trio.run(_measure, place, budget, tell)
    except BaseExceptionGroup as group:
        raise narrow(group) from None


async def _measure(place: Workplace, budget: Budget, tell: Progress) -> tuple[list[Row], dict[str, str]]:
    first, installed, ready = Series("our first line"), Series("our secrets"), Series("our sshd")
    finished = Series("systemd, finished")
    async with open_workshop(place.paths, place.paths.state / "bench.sqlite") as shop:
        library = shop.library()
        machine = library.vm(MACHINE)
        plan = replace(await shop.plan(machine, library, tell), instance="ours", forwards=((0, 22), (0, SECRETS_PORT)))
        image = await shop.image(library, machine.image, tell)
        systemd = replace(plan, instance="systemd", boot=await ensure_systemd_image(image, place.paths, tell))
        boots = {
            "ours": _Boot(
                plan=plan,
                lines={first: FIRST, installed: SECRETS, ready: OURS_READY},
                secrets=shop.secrets(machine).root,
            ),
            "systemd": _Boot(plan=systemd, lines={finished: SYSTEMD_READY}),
        }
        for number in budget.rounds():
            for name in in_turn(number, "ours", "systemd"):
                tell(f"boot {number + 1}, {name}", None)
                await _boot(shop, place, boots[name])
    facts = {
        "accelerator": plan.qemu.accelerator,
        "qemu": plan.qemu.version,
        "cpu": plan.cpu,
        "cpu_count": str(plan.cpu_count),
        "image_digest": image.digest,
        "kernel": image.kernel_version,
    }
    return _rows(first, installed, ready, finished), facts


def _rows(first: Series, installed: Series, ready: Series, finished: Series) -> list[Row]:
    base = "a systemd boot of the same Debian (same QEMU options, kernel and packages) to the end of multi-user.target"
    return [
        Row(name="boot to our init", compares=f"first line of our init : {base}", ours=first, base=finished, target=0.25),
        Row(name="boot to the secrets", compares=f"secrets installed : {base}", ours=installed, base=finished),
        Row(name="boot to sshd", compares=f"our sshd listens, secrets included : {base}", ours=ready, base=finished),
    ]


async def _boot(shop: Workshop, place: Workplace, boot: _Boot) -> None:
    """Boot once and note when each line came, counted from before QEMU's start."""
    with shop.cores.share(boot.plan.cpu_count) as cores:
        began = trio.current_time()
        opened = open_instance(
            boot.plan,
            instances=shop.paths.instances,
            logs=place.folder / "logs",
            bridge=shop.bridge,
            cores=cores,
            purpose="build",
        )
        async with opened as instance, trio.open_nursery() as nursery:
            if boot.secrets is not None:
                nursery.start_soon(_deliver, instance.port(SECRETS_PORT), boot.secrets)
            times = await _watch(instance.files.console_log, list(boot.lines.values()))
            for series, when in zip(boot.lines, times, strict=True):
                series.seconds.append(when - began)
            nursery.cancel_scope.cancel()


async def _deliver(port: int, root: Path) -> None:
    await deliver_secrets(port, root, machine=MACHINE)


async def _watch(console: Path, patterns: Sequence[re.Pattern[bytes]]) -> list[float]:
    """When each line appeared on the console, in their order."""
    times: list[float] = []
    with trio.move_on_after(BOOT_LIMIT_S):
        while len(times) < len(patterns):
            if patterns[len(times)].search(_read(console)):
                times.append(trio.current_time())
            else:
                await trio.sleep(POLL_S)
        return times
    said = _read(console)[-2000:].decode(errors="replace")
    raise BenchError(f"no line {patterns[len(times)].pattern!r} on the console within {BOOT_LIMIT_S:.0f} s:\n{said}")


def _read(console: Path) -> bytes:
    return console.read_bytes().replace(b"\r", b"") if console.exists() else b""
