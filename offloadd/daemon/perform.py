"""One build: find what it needs, route, prepare, build, collect.

What fails before its first step by the machine's doing goes to the next machine that can.  What looks like a fault of user
emulation goes once to a machine with a kernel of its own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from offloadd.builder.bulk import channel_for, open_bulk
from offloadd.builder.fault import find_emulator_fault
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.prepare import prepare_source
from offloadd.builder.run import DEFAULT_MAX_SILENT_S, DEFAULT_TIMEOUT_S, Job, Report, run_build
from offloadd.daemon.dispatch import MACHINE_FAULTS, Assignment, Dispatcher
from offloadd.daemon.events import EventLog
from offloadd.daemon.guests import Origin
from offloadd.daemon.machines import Machines
from offloadd.daemon.pool import Pool
from offloadd.daemon.work import Work, find_work
from offloadd.daemon.workshop import Workshop
from offloadd.environment.store import Environment
from offloadd.errors import (
    BuildFailedError,
    EmulatorFault,
    MachineLostError,
    NoMachineError,
    NotFoundError,
    OffloadError,
    UsageError,
)
from offloadd.model.machine import BinfmtMachine, LocalMachine, Machine, SshMachine, VmMachine
from offloadd.model.quantity import format_date, format_size
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import BuildState
from offloadd.model.system import SYSTEMS
from offloadd.place.local import open_local_place
from offloadd.place.place import Place
from offloadd.place.remote import open_remote_place
from offloadd.place.vm import open_in_guest
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.route import Emulation

PROGRESS_S = 0.2
_ORIGINS: dict[Origin, str] = {"boot": "a fresh boot", "clone": "a fresh clone", "warm": "a fresh clone, which was waiting,"}
_LASTING = ("machine", "kind", "route", "retried")
"""Fields of the result that an attempt finds there."""
LOG_TAIL = 64 * 1024
"""Characters of the log in which the words of an emulator that failed are looked for."""


class LogTail:
    """The last words of a log that comes in pieces."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self._size += len(text)
        # Cut now and then, not at each of a million pieces.
        if self._size > 2 * LOG_TAIL:
            self._pieces = [self.text()]
            self._size = len(self._pieces[0])

    def text(self) -> str:
        return "".join(self._pieces)[-LOG_TAIL:]


@dataclass
class ActiveBuild:
    """One build between its request and its end."""

    id: str
    request: BuildRequest
    system: str
    folder: Path
    events: EventLog
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    waiting: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of who waits for the source."""
    source_begun: bool = False
    source_complete: trio.Event = field(default_factory=trio.Event)
    summary: dict[str, Any] = field(default_factory=dict)
    """What is known of it from the beginning."""
    result: dict[str, Any] = field(default_factory=dict)
    """What becomes build.json."""
    cancelled: str = ""
    """Why, when somebody cancelled it."""
    log_tail: LogTail = field(default_factory=LogTail)
    _told: float = 0.0

    @property
    def source(self) -> Path:
        """The source as it was sent, a tar."""
        return self.folder / "source.tar"

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs.tar"

    def begin_attempt(self, work: Work) -> None:
        """Forget what an attempt on another machine has left."""
        self.log_tail = LogTail()
        self.outputs.unlink(missing_ok=True)
        self.result = self.summary | _describe(work) | {key: value for key, value in self.result.items() if key in _LASTING}

    def tell(self, text: str, fraction: float | None = None) -> None:
        """Note progress; what changes faster than anybody reads is thinned out."""
        now = trio.current_time()
        if fraction is None or now - self._told >= PROGRESS_S:
            self._told = now if fraction is not None else 0.0
            self.events.append("phase", text=text, fraction=None if fraction is None else round(fraction, 3))


class Move(Protocol):
    def __call__(self, active: ActiveBuild, state: BuildState, **changes: Any) -> None: ...


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
        active.result |= _describe(work)
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
        async with self._open_place(active, work, machine) as place:
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

    @asynccontextmanager
    async def _open_place(self, active: ActiveBuild, work: Work, machine: Machine) -> AsyncIterator[Place]:
        async with AsyncExitStack() as stack:
            if isinstance(machine, SshMachine):
                active.tell(f"logging in to {machine.name}")
                yield await stack.enter_async_context(open_remote_place(machine, self.shop.bridge))
                return
            environment = await stack.enter_async_context(self.shop.environments.open(work.environment, active.tell))
            active.result["environment"] = environment.digest
            if isinstance(machine, LocalMachine | BinfmtMachine):
                root = await stack.enter_async_context(self.shop.environments.roots.open(environment, active.tell))
                stuck = machine.stuck_timeout if isinstance(machine, BinfmtMachine) else None
                opened = open_local_place(root, self.shop.paths.state / "work", stuck_timeout_s=stuck)
                yield await stack.enter_async_context(opened)
            else:
                assert isinstance(machine, VmMachine)
                yield await stack.enter_async_context(self._open_vm(active, work, machine, environment))

    @asynccontextmanager
    async def _open_vm(
        self, active: ActiveBuild, work: Work, machine: VmMachine, environment: Environment
    ) -> AsyncIterator[Place]:
        """A VM of the build's own, or the one that the build is to leave running."""
        shop, request = self.shop, active.request
        own = await shop.plan(machine, shop.library(), active.tell)
        plan = plan_for_build(
            own,
            f"build-{active.id}",
            date=work.date,
            cpu=request.asked_cpu,
            pinned_cpu=machine.cpu is not None,
            system=work.system,
        )
        if request.keep_machine:
            async with self._open_kept(active, machine, own, plan, environment) as place:
                yield place
            return
        self.move(active, BuildState.BOOTING)
        began = trio.current_time()
        opened = self.pool.open(plan, machine, environment.path, active.tell, logs=active.folder)
        async with opened as guest:
            active.result |= {"boot_s": round(trio.current_time() - began, 3), "guest": guest.origin}
            active.tell(f"{_ORIGINS[guest.origin]} of {machine.name} at {format_date(plan.date)} on {plan.cpu}")
            placed = open_in_guest(guest.instance, guest.agent, environment.path, own=True, mounted=guest.environment)
            async with placed as place:
                yield place

    @asynccontextmanager
    async def _open_kept(
        self, active: ActiveBuild, machine: VmMachine, own: VmPlan, plan: VmPlan, environment: Environment
    ) -> AsyncIterator[Place]:
        """The machine that runs for its user, which is started when it does not, and goes on afterwards.

        Args:
            own: the plan with which the machine would be started.
            plan: what the build asks for.
        """
        self.move(active, BuildState.BOOTING)
        began, was_running = trio.current_time(), self.machines.find(machine.name)
        if not was_running:
            _check_fits(machine, plan, own)  # before it is started in vain
        running = was_running or await self.machines.start(machine.name, active.tell)
        assert running.instance is not None
        _check_fits(machine, plan, running.instance.record.plan)
        if running.guest is None:
            raise MachineLostError("the connection to it has just broken", subject=machine.name, hint="try again")
        active.result |= {"boot_s": 0.0 if was_running else round(trio.current_time() - began, 3), "guest": "kept"}
        active.tell(f"building in {machine.name}, which goes on running")
        async with open_in_guest(running.instance, running.guest, environment.path, own=False) as place:
            yield place

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
                report = await run_build(place.service, job, outputs, _Listener(active, self.move, work))
        _judge(active, report, recipe.steps)


def _personality(system: str, machine: Machine) -> str | None:
    """A 32-bit build on a 64-bit kernel is told a 32-bit machine; qemu-user does that by itself."""
    return "linux32" if SYSTEMS[system].bits == 32 and not isinstance(machine, BinfmtMachine) else None


def _check_fits(machine: VmMachine, wanted: VmPlan, running: VmPlan) -> None:
    """Raise `UsageError` when a machine that runs for its user is not what the build asks for."""
    hint = f"without --keep-machine the build gets a fresh guest; or offload vm stop {machine.name}"
    if wanted.cpu != running.cpu:
        raise UsageError(f"has the CPU {running.cpu}, and the build asks for {wanted.cpu}", subject=machine.name, hint=hint)
    if wanted.boot.digest != running.boot.digest:
        raise UsageError("runs from an older image", subject=machine.name, hint=hint)
    # A machine without a date in its file has that of its start.
    if machine.date not in (None, running.date):
        raise UsageError("was started at another date than its file says now", subject=machine.name, hint=hint)


def _describe(work: Work) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": work.recipe.name,
        "version": work.version,
        "system": work.system,
        "suite": work.recipe.suite,
        "sources": [path.name for path in work.sources],
    }
    if work.date_from:
        described["date_from"] = work.date_from
    return described


def _judge(active: ActiveBuild, report: Report, steps: tuple[str, ...]) -> None:
    active.result |= {
        "exit_status": report.exit_status,
        "duration_s": round(report.duration_s, 3),
        "clock_end": report.clock_end,
        "outputs_channel": report.outputs_channel,
    }
    if not report.exit_status:
        return
    active.result["failed_step"] = report.failed_step
    command = steps[report.failed_step - 1 : report.failed_step]
    hint = "--keep-failed brings the build directory back" if not active.request.keep_failed else ""
    where = f"step {report.failed_step} of {len(steps)}"
    raise BuildFailedError(f"{where} failed with exit status {report.exit_status}", detail="".join(command), hint=hint)


class _Listener:
    """Writes what happens in the guest to the build's event log."""

    def __init__(self, active: ActiveBuild, move: Move, work: Work) -> None:
        self._active = active
        self._move = move
        self._work = work

    def started(self, report: Report) -> None:
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
        self._move(self._active, BuildState.COLLECTING)
