"""One build: route, prepare, boot, run, collect.

A machine that its user started takes builds that ask for nothing else than it is; every other build gets a VM of its own,
booted from the same image with the build's date and CPU, and thrown away after it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.prepare import prepare_source
from offloadd.builder.run import DEFAULT_MAX_SILENT_S, DEFAULT_TIMEOUT_S, Job, Report, run_build
from offloadd.daemon.events import EventLog
from offloadd.daemon.machines import Machines
from offloadd.daemon.workshop import Workshop
from offloadd.environment.store import Environment
from offloadd.errors import BuildFailedError, MachineLostError, TransientError
from offloadd.guest.open import open_guest
from offloadd.guest.ssh import Guest
from offloadd.model.machine import Machine
from offloadd.model.quantity import format_date, format_size
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import BuildState
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.route import find_route
from offloadd.vm.instance import Instance, open_instance, while_running

PROGRESS_S = 0.2


@dataclass
class ActiveBuild:
    """One build between its request and its end."""

    id: str
    request: BuildRequest
    folder: Path
    events: EventLog
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    waiting: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of who waits for the source."""
    source_begun: bool = False
    source_complete: trio.Event = field(default_factory=trio.Event)
    result: dict[str, Any] = field(default_factory=dict)
    """What becomes build.json."""
    cancelled: str = ""
    """Why, when somebody cancelled it."""
    _told: float = 0.0

    @property
    def source(self) -> Path:
        """The source as it was sent, a tar."""
        return self.folder / "source.tar"

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs.tar"

    def tell(self, text: str, fraction: float | None = None) -> None:
        """Note progress; what changes faster than anybody reads is thinned out."""
        now = trio.current_time()
        if fraction is None or now - self._told >= PROGRESS_S:
            self._told = now if fraction is not None else 0.0
            self.events.append("phase", text=text, fraction=None if fraction is None else round(fraction, 3))


class Move(Protocol):
    def __call__(self, active: ActiveBuild, state: BuildState, **changes: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A guest to build in."""

    instance: Instance
    guest: Guest
    own: bool
    """Booted for this build alone, so that its clock is ours to set."""

    @property
    def base(self) -> float:
        return self.instance.record.plan.date.timestamp()

    def clock(self) -> float:
        """What the guest's clock should show now, in seconds since 1970."""
        return self.base if self.own else self.base + time.time() - self.instance.record.began


async def perform(
    active: ActiveBuild, shop: Workshop, machines: Machines, slots: dict[str, trio.CapacityLimiter], move: Move
) -> None:
    """Run the build to a good end.

    Args:
        slots: one limiter for each machine, by name.
        move: stores a change of the build's state.
    Raises:
        OffloadError: it did not come to a good end.
    """
    request = active.request
    library = shop.library()
    route = find_route(request, library.machines.values())
    machine = route.machine
    active.result |= {"machine": machine.name, "passed_over": route.passed_over}
    slot = slots.setdefault(machine.name, trio.CapacityLimiter(machine.parallel_builds))
    slot.total_tokens = machine.parallel_builds
    if slot.available_tokens < 1:
        active.tell(f"waiting for a slot on {machine.name}")
    async with slot:
        move(active, BuildState.PREPARING, machine=machine.name)
        system = next(system for system in machine.systems if system in request.recipe.systems)
        plan = await shop.plan(machine, library, active.tell)
        plan = plan_for_build(
            plan, f"build-{active.id}", date=request.asked_date, cpu=request.asked_cpu, pinned_cpu=machine.cpu is not None
        )
        environment = await shop.environment(request.recipe, system, active.tell)
        sources = await shop.sources(request.recipe, active.tell)
        active.result |= {"system": system, "environment": environment.digest, "suite": request.recipe.suite}
        async with _open_place(active, shop, machines, machine, plan, move) as place:
            _describe(active, place)
            move(active, BuildState.RUNNING)
            async with while_running(place.instance, MachineLostError):
                await _build(active, place, environment, sources, move)


@asynccontextmanager
async def _open_place(
    active: ActiveBuild, shop: Workshop, machines: Machines, machine: Machine, plan: VmPlan, move: Move
) -> AsyncIterator[_Place]:
    running = machines.find(machine.name)
    if running and running.instance and running.guest and _fits(active.request, plan, running.instance.record.plan):
        active.tell(f"building in {machine.name}, which runs")
        active.result["boot_s"] = 0.0
        yield _Place(instance=running.instance, guest=running.guest, own=False)
        return
    move(active, BuildState.BOOTING)
    active.tell(f"booting {machine.name} at {format_date(plan.date)} on {plan.cpu} ({plan.qemu.accelerator})")
    began = trio.current_time()
    with shop.cores.share(plan.cpu_count) as cores:
        opened = open_instance(
            plan, instances=shop.paths.instances, logs=active.folder, bridge=shop.bridge, cores=cores, purpose="build"
        )
        async with opened as instance, open_guest(instance, shop.secrets(machine), shop.bridge, active.tell) as guest:
            active.result["boot_s"] = round(trio.current_time() - began, 3)
            yield _Place(instance=instance, guest=guest, own=True)


def _fits(request: BuildRequest, wanted: VmPlan, running: VmPlan) -> bool:
    """Whether a machine that runs for its user is what the build asks for."""
    same = (wanted.date, wanted.cpu, wanted.boot.digest) == (running.date, running.cpu, running.boot.digest)
    return request.asked_date is None and same


def _describe(active: ActiveBuild, place: _Place) -> None:
    record = place.instance.record
    plan = record.plan
    active.result |= {
        "instance": plan.instance,
        "image": plan.boot.image,
        "image_digest": plan.boot.digest,
        "cpu": plan.cpu,
        "cpu_count": plan.cpu_count,
        "missing_cpu_features": list(record.missing_features),
        "memory_mib": plan.memory_mib,
        "accelerator": plan.qemu.accelerator,
        "qemu": plan.qemu.version,
        "date": format_date(plan.date),
        "own_vm": place.own,
        "cores": list(record.cores),
    }


async def _build(active: ActiveBuild, place: _Place, environment: Environment, sources: list[Path], move: Move) -> None:
    recipe, request = active.request.recipe, active.request
    newest = int(place.clock())
    source = active.folder / "source-sent.tar"
    await trio.to_thread.run_sync(prepare_source, active.source, sources, source, newest)
    serial = f"env-{active.id}"
    job = Job(
        build=active.id,
        name=f"{recipe.name}-{recipe.version}",
        steps=recipe.steps,
        env=dict(recipe.env),
        outputs=recipe.outputs,
        source=source,
        environment=serial,
        set_clock=newest if place.own else None,
        expected_clock=place.clock,
        timeout_s=request.timeout_s or DEFAULT_TIMEOUT_S,
        max_silent_s=request.max_silent_s or DEFAULT_MAX_SILENT_S,
        keep_failed=request.keep_failed,
    )
    active.tell(f"sending the source into the guest ({format_size(source.stat().st_size)})")
    try:
        await place.instance.attach_disk(environment.path, serial)
        with open_outputs_receiver(active.outputs) as outputs:
            report = await run_build(place.guest, job, outputs, _Listener(active, move))
    finally:
        if not place.own:
            await _take_disk_back(place.instance, serial)
    _judge(active, report)


async def _take_disk_back(instance: Instance, serial: str) -> None:
    """From a machine that lives on.  A guest that keeps the disk costs a slot of its bus, not the build."""
    with trio.CancelScope(shield=True), suppress(TransientError, trio.TooSlowError):
        await instance.detach_disk(serial)


def _judge(active: ActiveBuild, report: Report) -> None:
    active.result |= {"exit_status": report.exit_status, "duration_s": round(report.duration_s, 3)}
    if not report.exit_status:
        return
    active.result["failed_step"] = report.failed_step
    command = active.request.recipe.steps[report.failed_step - 1 : report.failed_step]
    hint = "--keep-failed brings the build directory back" if not active.request.keep_failed else ""
    where = f"step {report.failed_step} of {len(active.request.recipe.steps)}"
    raise BuildFailedError(f"{where} failed with exit status {report.exit_status}", detail="".join(command), hint=hint)


class _Listener:
    """Writes what happens in the guest to the build's event log."""

    def __init__(self, active: ActiveBuild, move: Move) -> None:
        self._active = active
        self._move = move

    def started(self, report: Report) -> None:
        said = report.started
        clock = float(said["clock"])
        self._active.result |= {
            "clock": clock,
            "cpu_in_guest": str(said.get("cpu", ""))[:200],
            "kernel": str(said.get("kernel", ""))[:200],
            "started": time.time(),
        }
        self._active.tell("building")

    def step(self, index: int, count: int, command: str) -> None:
        self._active.events.append("step", index=index, count=count, command=command)

    def log(self, text: str) -> None:
        self._active.events.append("log", text=text)

    def collecting(self) -> None:
        self._move(self._active, BuildState.COLLECTING)
