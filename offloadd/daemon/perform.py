"""One build: find what it needs, route, prepare, build, collect.

What fails before its first step by the machine's doing goes to the next machine that can.  What looks like a fault of user
emulation goes once to a machine with a kernel of its own.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import trio

from offloadd.builder.bulk import channel_for, open_bulk
from offloadd.builder.debian import CHECK_DEPENDS
from offloadd.builder.fault import find_emulator_fault
from offloadd.builder.job import DEFAULT_MAX_SILENT_S, DEFAULT_TIMEOUT_S, Job, Report
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.prepare import prepare_source
from offloadd.daemon.active import ActiveBuild, Move, describe
from offloadd.daemon.dispatch import MACHINE_FAULTS, Assignment, Dispatcher
from offloadd.daemon.machines import Machines
from offloadd.daemon.places import Places
from offloadd.daemon.pool import Pool
from offloadd.daemon.work import Work, find_work
from offloadd.daemon.workshop import Workshop
from offloadd.errors import (
    BuildFailedError,
    EmulatorFault,
    NoMachineError,
    NotFoundError,
    OffloadError,
)
from offloadd.model.machine import BinfmtMachine, Machine
from offloadd.model.quantity import format_size
from offloadd.model.state import BuildState
from offloadd.model.system import SYSTEMS
from offloadd.place.place import Place
from offloadd.route import Emulation


@dataclass(frozen=True, kw_only=True)
class Performer:
    """What a build needs of the daemon."""

    shop: Workshop
    pool: Pool
    machines: Machines
    dispatcher: Dispatcher
    move: Move
    """Stores a change of a build's state."""

    async def perform(self, active: ActiveBuild) -> None:
        """Run the build to a good end.

        Raises:
            OffloadError: it did not come to a good end.
        """
        self.move(active, BuildState.PREPARING)
        work = await find_work(active.request, active.system, active.source, self.shop, active.tell)
        active.result |= describe(work)
        remembered = self.shop.database.quirk(active.request.name, active.system)
        quirk, tried = remembered.reason if remembered else "", dict[str, OffloadError]()
        fault: EmulatorFault | None = None
        fresh = active.request.debian is None
        while True:
            try:
                await self._try(active, work, quirk, tried)
            except NoMachineError as exc:
                # The first failure says more than that nobody is left.
                raise next(iter(tried.values()), fault or exc) from None
            except EmulatorFault as exc:
                if quirk or not await self._has_full_emulation(work, exc.what, tried):
                    raise
                fault, quirk = exc, exc.what
                active.tell(f"{quirk}: trying once more in a machine with a kernel of its own")
                active.result["retried"] = quirk
                self.move(active, BuildState.PREPARING)
            except NotFoundError as exc:
                if fresh:
                    raise
                # The mirrors have moved on since the dependencies were resolved: other versions are there now.
                fresh = True
                active.tell(f"{exc}; resolving once more")
                self.move(active, BuildState.PREPARING)
                work = await find_work(active.request, active.system, active.source, self.shop, active.tell, fresh=True)
            except MACHINE_FAULTS as exc:
                if "clock" in active.result:
                    raise
                active.tell(f"{exc}; trying the next machine")
                self.move(active, BuildState.PREPARING)
            else:
                if quirk and not remembered:
                    self.shop.database.add_quirk(active.request.name, active.system, quirk, active.id)
                return

    async def _has_full_emulation(self, work: Work, quirk: str, tried: Collection[str]) -> bool:
        decision = await self.dispatcher.decide(work.needs(quirk), without=tried)
        return bool(decision.candidates)

    async def _try(self, active: ActiveBuild, work: Work, quirk: str, tried: dict[str, OffloadError]) -> None:
        """One attempt, on the best machine that has not failed yet."""

        def waiting(what: str) -> None:
            active.tell(f"waiting for {what}")
            self.move(active, BuildState.QUEUED)

        async with self.dispatcher.take(work.needs(quirk), without=tried, waiting=waiting) as assignment:
            machine = assignment.machine
            self.move(active, BuildState.PREPARING, machine=machine.name)
            active.result |= {"machine": machine.name, "kind": machine.kind, "route": assignment.decision.to_json()}
            try:
                await self._build_on(active, work, assignment)
            except MACHINE_FAULTS as exc:
                exc.subject = exc.subject or machine.name
                tried[machine.name] = exc
                raise

    async def _build_on(self, active: ActiveBuild, work: Work, assignment: Assignment) -> None:
        machine = assignment.machine
        active.begin_attempt(work)
        places = Places(shop=self.shop, pool=self.pool, machines=self.machines, move=self.move)
        async with places.open(active, work, machine) as place:
            active.result |= place.facts
            self.move(active, BuildState.RUNNING)
            try:
                await self._build(active, work, machine, place)
            except BuildFailedError as exc:
                if assignment.emulation is Emulation.USER and not isinstance(exc, EmulatorFault):
                    status = int(active.result.get("exit_status") or 0)
                    if reason := find_emulator_fault(active.log_tail.text(), status):
                        raise EmulatorFault(reason, detail=exc.detail, hint=exc.hint) from exc
                raise

    async def _build(self, active: ActiveBuild, work: Work, machine: Machine, place: Place) -> None:
        recipe, request = work.recipe, active.request
        newest = int(place.clock())
        source = active.folder / "source-sent.tar"
        await trio.to_thread.run_sync(prepare_source, active.source, work.sources, source, newest)
        size = source.stat().st_size
        # A squashfs has 32 bits for a time.
        disks = place.disks if newest < 1 << 32 else None
        active.result["source_channel"] = channel = channel_for(size, disks)
        active.tell(f"sending the source{' as a disk' if channel == 'disk' else ''} ({format_size(size)})")
        async with open_bulk(disks, source) as bulk:
            job = Job(
                build=active.id,
                name=f"{recipe.name}-{recipe.version}",
                steps=recipe.steps,
                env=dict(recipe.env),
                outputs=recipe.outputs,
                source=source,
                bulk=bulk,
                environment=place.environment,
                personality=_personality(work.system, machine),
                network=recipe.network,
                set_clock=newest if place.set_clock else None,
                expected_clock=place.clock,
                timeout_s=request.timeout_s or recipe.timeout or DEFAULT_TIMEOUT_S,
                max_silent_s=request.max_silent_s or recipe.max_silent_time or DEFAULT_MAX_SILENT_S,
                keep_failed=request.keep_failed,
            )
            with open_outputs_receiver(active.outputs) as outputs:
                try:
                    report = await place.run(job, outputs, _Listener(active, self.move, work))
                finally:
                    if not outputs.complete:  # nobody wants a part of them
                        active.outputs.unlink(missing_ok=True)
        _judge(active, report, recipe.steps)


def _personality(system: str, machine: Machine) -> str | None:
    """A 32-bit build on a 64-bit kernel is told a 32-bit machine; qemu-user does that by itself."""
    found = SYSTEMS[system]
    return "linux32" if found.bits == 32 and found.kernel == "linux" and not isinstance(machine, BinfmtMachine) else None


def _judge(active: ActiveBuild, report: Report, steps: tuple[str, ...]) -> None:
    active.result["outputs_channel"] = report.outputs_channel
    if not report.exit_status:
        return
    command = steps[report.failed_step - 1 : report.failed_step]
    hint = "--keep-failed brings the build directory back" if not active.request.keep_failed else ""
    where = f"step {report.failed_step} of {len(steps)}"
    if CHECK_DEPENDS in "".join(command):
        hint = "with `network: true` in its machine's file the guest installs them"
        raise BuildFailedError("the guest lacks build dependencies: the log names them", hint=hint)
    raise BuildFailedError(f"{where} failed with exit status {report.exit_status}", detail="".join(command), hint=hint)


class _Listener:
    """Writes what happens in the guest to the build's event log."""

    def __init__(self, active: ActiveBuild, move: Move, work: Work) -> None:
        self._active = active
        self._move = move
        self._work = work
        self._report = Report(started={})

    def started(self, report: Report) -> None:
        self._report = report
        said = report.started
        kernel = str(said.get("kernel", ""))[:200]
        wanted = self._work.request.work.kernel
        if wanted and not kernel.startswith(wanted):
            raise NoMachineError(f"the machine runs Linux {kernel}, not {wanted}: the build was not started")
        self._active.result |= {
            "clock": float(said["clock"]),
            "cpu_in_guest": str(said.get("cpu", ""))[:200],
            "kernel": kernel,
            "started": time.time(),
        }
        self._active.tell("building")

    def step(self, index: int, count: int, command: str) -> None:
        self._active.events.append("step", index=index, count=count, command=command)

    def log(self, text: str) -> None:
        self._active.log_tail.add(text)
        self._active.events.append("log", text=text)

    def collecting(self) -> None:
        # Now: what is wrong with the outputs is an error of its own.
        report = self._report
        self._active.result |= {
            "exit_status": report.exit_status,
            "duration_s": round(report.duration_s, 3),
            "clock_end": report.clock_end,
        }
        if report.exit_status:
            self._active.result["failed_step"] = report.failed_step
        self._move(self._active, BuildState.COLLECTING)
