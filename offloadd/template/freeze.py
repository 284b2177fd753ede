"""Making a template: boot, wait for the agent, save."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import trio

from offloadd.bridge import Bridge
from offloadd.digest import sparse_sha256
from offloadd.errors import AgentError, BootError
from offloadd.guest.agent import Agent
from offloadd.guest.open import boot_twice, check_clock, open_guest, personalize
from offloadd.model.quantity import format_date
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress
from offloadd.template.key import TemplateKey
from offloadd.vm.instance import Instance, open_instance, while_running
from offloadd.vm.memory import Saving, copy_memory, open_memory

RAM, STATE, DISK, MANIFEST = "ram", "state", "disk.qcow2", "template.json"

WARM_UP_S = 300.0
"""For the first build, which takes a second; ten times that where all is emulated on a loaded host."""

SETTLE_S = 1.0
RATE_TOLERANCE = 0.05
"""Of what the guest's clock may be faster or slower than ours: what is wrong is wrong by more."""

WarmUp = Callable[[Agent], Awaitable[None]]
"""Is run in the guest before it is saved, so that its clones find in their memory what every build needs."""


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """Where a guest is booted to be saved."""

    instances: Path
    logs: Path
    bridge: Bridge
    cores: Sequence[int]


async def freeze(
    plan: VmPlan, key: TemplateKey, bench: Workbench, warm_up: WarmUp, directory: Path, progress: Progress
) -> None:
    """Fill the empty `directory` with a template.

    Raises:
        BootError: the guest did not come up.
        AgentError, ProtocolError: it does not do what it is asked for.
        UnsavableError: QEMU cannot save it.
        MachineLostError: QEMU went away.
        HostError, OSError: the host lacks something, the disk is full.
    """
    progress(f"booting {plan.machine} once, to be saved as a template", None)
    await boot_twice(lambda: _freeze(plan, key, bench, warm_up, directory, progress), lambda text: progress(text, None))


async def _freeze(
    plan: VmPlan, key: TemplateKey, bench: Workbench, warm_up: WarmUp, directory: Path, progress: Progress
) -> None:
    ram = open_memory("offload-template", plan.memory_mib << 20)
    try:
        opened = open_instance(
            plan,
            instances=bench.instances,
            logs=bench.logs,
            bridge=bench.bridge,
            cores=bench.cores,
            purpose="build",
            memory=Saving(ram=ram),
        )
        async with opened as instance, open_guest(instance, lambda text: None) as agent:
            async with while_running(instance, BootError):
                with trio.move_on_after(WARM_UP_S) as limit:
                    await personalize(instance, agent)
                    await check_processors(agent, plan)
                    began = await _look(instance, agent)
                    await warm_up(agent)
                    await agent.run("/bin/sync")
                    # The kernel clears away behind programs that have ended: each clone would do it again.
                    await trio.sleep(SETTLE_S)
                    check_rate(began, await _look(instance, agent), plan.machine)
                if limit.cancelled_caught:
                    raise AgentError(f"its first build did not end within {WARM_UP_S:.0f} s", subject=plan.machine)
            progress("saving it", None)
            await _save(instance, directory)
        await trio.to_thread.run_sync(copy_memory, ram, directory / RAM)
        await trio.to_thread.run_sync(_write_manifest, key, plan.machine, directory)
    finally:
        os.close(ram)


async def check_processors(agent: Agent, plan: VmPlan) -> None:
    """AgentError: some do not run, as none would in any clone."""
    _, said = await agent.run("/usr/bin/nproc")
    # Options may have said another number to QEMU.
    if said.strip() != b"%d" % plan.cpu_count and not plan.options:
        found = said[:20].decode(errors="replace").strip()
        raise AgentError(f"runs on {found} of its {plan.cpu_count} processors", subject=plan.machine)


@dataclass(frozen=True, kw_only=True)
class Look:
    """The guest's clock, seen between two moments of the host's; all in seconds."""

    clock: float
    earliest: float
    latest: float


async def _look(instance: Instance, agent: Agent) -> Look:
    earliest = time.monotonic()
    said = await agent.call("clock")
    check_clock(said, instance.record.clock(), agent.machine)
    return Look(clock=float(said["clock"]), earliest=earliest, latest=time.monotonic())


def check_rate(first: Look, last: Look, machine: str) -> None:
    """AgentError: the guest's clock does not run as fast as the host's.  Each clone's would go wrong in the same way."""
    passed = last.clock - first.clock
    least, most = last.earliest - first.latest, last.latest - first.earliest
    if least * (1 - RATE_TOLERANCE) <= passed <= most * (1 + RATE_TOLERANCE):
        return
    what = f"its clock went {passed:.1f} s in {most:.1f} s: it has measured its processor wrongly"
    raise AgentError(what, subject=machine, hint="try again when the host has less to do")


async def _save(instance: Instance, directory: Path) -> None:
    # Not into a file: a disk that is full is for us to tell, not for QEMU.
    state = open_memory("offload-state")
    try:
        await instance.save(state)
        await trio.to_thread.run_sync(copy_memory, state, directory / STATE)
    finally:
        os.close(state)
    # Now nobody writes to its disk any more.
    await instance.stop(polite_s=0)
    await trio.to_thread.run_sync(shutil.copyfile, instance.files.disk, directory / DISK)


def _write_manifest(key: TemplateKey, machine: str, directory: Path) -> None:
    files = {
        name: {"size": (directory / name).stat().st_size, "sparse_sha256": sparse_sha256(directory / name)}
        for name in (RAM, STATE, DISK)
    }
    manifest = {
        "digest": key.digest,
        "machine": machine,
        "facts": key.facts,
        "files": files,
        "made": format_date(datetime.now(UTC)),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
