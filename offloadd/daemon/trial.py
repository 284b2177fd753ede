"""`offload machine test`: a machine is tried for real, as `guix offload test` does.

Each check is told as soon as it is done.  The last one is a build, which goes the way of all builds.
"""

from __future__ import annotations

import io
import os
import secrets
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from offloadd.binfmt.status import Status, find_fault, find_usable, read_status
from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.plain import run_plain_build
from offloadd.builder.run import run_build
from offloadd.builder.tar import TarError, TarReader
from offloadd.daemon.guests import FreshGuest, Guests, SshGuest
from offloadd.daemon.workshop import Workshop
from offloadd.errors import HostError, OffloadError, ProtocolError
from offloadd.guest.ssh import Guest, open_remote
from offloadd.host import native_systems, systems_of
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import BinfmtMachine, LocalMachine, Machine, SshMachine, VmMachine
from offloadd.model.quantity import format_date, format_duration, format_size
from offloadd.model.system import SYSTEMS
from offloadd.place.local import LocalService
from offloadd.place.place import Place
from offloadd.place.plain_probe import exchange_plain, probe_plain
from offloadd.place.probe import EXCHANGED, Probe, Shell, exchange_file, format_offset, probe_local, probe_ssh
from offloadd.place.remote import RemoteService
from offloadd.place.vm import AgentShell, GuestService
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.process import Progress, host_error

BUILD_S = 600.0
"""For the build of a trial, which takes a fraction of a second unless all is emulated."""

EMULATOR_S = 10.0
"""For an emulator to name its version."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    text: str
    """What was found, or why it failed."""
    took_s: float
    detail: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


class _Stopped(Exception):
    """A check failed without which the others make no sense."""


class Trial:
    """One machine's trial.

    Args:
        tell: is called with each check when it is done.
    """

    def __init__(
        self, machine: Machine, shop: Workshop, guests: Guests, progress: Progress, tell: Callable[[Check], None]
    ) -> None:
        self.checks: list[Check] = []
        self._machine = machine
        self._shop = shop
        self._guests = guests
        self._progress = progress
        self._tell = tell

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    async def run(self) -> None:
        """Try everything; what fails is in `checks`."""
        machine = self._machine
        try:
            match machine:
                case LocalMachine():
                    await self._try_local()
                case BinfmtMachine():
                    await self._try_binfmt(machine)
                case VmMachine():
                    await self._try_vm(machine)
                case SshMachine():
                    await self._try_ssh(machine)
        except _Stopped:
            pass

    async def _check(self, name: str, work: Callable[[], Awaitable[T]], words: Callable[[T], str]) -> T:
        """One check; `_Stopped` when it fails."""
        self._progress(name, None)
        began = trio.current_time()
        try:
            found = await work()
            self._add(Check(name=name, ok=True, text=words(found), took_s=trio.current_time() - began))
        except (OffloadError, OSError) as exc:
            error = host_error(exc, "", self._shop.paths.state) if isinstance(exc, OSError) else exc
            took = trio.current_time() - began
            self._add(Check(name=name, ok=False, text=error.what, took_s=took, detail=error.detail, hint=error.hint))
            raise _Stopped from exc
        return found

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        self._tell(check)

    def _note(self, name: str, text: str, fault: str = "", hint: str = "") -> None:
        self._add(Check(name=name, ok=not fault, text=fault or text, took_s=0.0, hint=hint if fault else ""))

    async def _try_ssh(self, machine: SshMachine) -> None:
        async with AsyncExitStack() as stack:
            opened = open_remote(self._shop.bridge, machine)
            where = f"{machine.user}@{machine.host}:{machine.port}"
            guest = await self._check("reach it", lambda: stack.enter_async_context(opened), lambda _: where)
            probe = await self._try_shell(guest)
            self._note_clock(probe, time.time())
            self._note_probe(probe)
            self._note_systems(machine, probe)
            hint = "install bubblewrap there; its users must be allowed to make user namespaces"
            self._note("sandbox", "bubblewrap works", probe.sandbox, hint)
            if not probe.sandbox:
                await self._try_build(Place(run=partial(run_build, RemoteService(guest)), clock=time.time))

    async def _try_vm(self, machine: VmMachine) -> None:
        shop = self._shop
        if not machine.volatile:
            # A trial's guest is ended without being told: what it had not written yet would be lost.
            hint = f"offload vm start {machine.name}, then build in it: offload build --machine {machine.name}"
            self._note("start it", "", "keeps its disk, which is not for a trial to boot from", hint)
            return
        instance_name = f"test-{secrets.token_hex(4)}"
        plan = await self._check(
            "prepare it", lambda: shop.plan(machine, shop.library(), self._progress), lambda plan: f"image {plan.boot.image}"
        )
        logs = shop.paths.logs / "tests" / machine.name
        if not plan.boot.has_agent:
            await self._try_bare_vm(machine, plan_for_build(plan, instance_name, date=None, cpu=None, pinned_cpu=True), logs)
            return
        plan = plan_for_build(plan, instance_name, date=None, cpu=None, pinned_cpu=machine.cpu is not None)
        async with AsyncExitStack() as stack:

            async def boot() -> FreshGuest:
                opened = self._guests.open(plan, machine, self._progress, logs=logs, purpose="build")
                return await stack.enter_async_context(opened)

            words = f"{plan.cpu}, {plan.qemu.accelerator.upper()}, {format_date(plan.date)}"
            guest = await self._check("start it", boot, lambda guest: f"a fresh {guest.origin}: {words}")

            clock = guest.instance.record.clock
            probe = await self._try_shell(AgentShell(guest.agent), clock)
            self._note_clock(probe, clock())
            self._note_probe(probe)
            await self._try_build(Place(run=partial(run_build, GuestService(guest.agent)), clock=clock))

    async def _try_bare_vm(self, machine: VmMachine, plan: VmPlan, logs: Path) -> None:
        """One with a disk of its own: it takes its secrets, and one can log in.  Only on the Hurd is something built there."""
        async with AsyncExitStack() as stack:

            async def boot() -> SshGuest:
                opened = self._guests.open_by_ssh(plan, machine, self._progress, logs=logs, purpose="build")
                return await stack.enter_async_context(opened)

            words = f"{plan.cpu}, {plan.qemu.accelerator.upper()}, {format_date(plan.date)}"
            name = "start it" if isinstance(machine, Childhurd) and not machine.offloading else "start it and log in"
            guest = await self._check(name, boot, lambda _: words)
            if guest.shell is None:
                return
            clock = guest.instance.record.clock
            probe = await self._try_plain_shell(guest.shell, clock)
            self._note_clock(probe, clock())
            self._note_probe(probe)
            if isinstance(machine, Childhurd):
                run = partial(run_plain_build, guest.shell, thrown_away=True)
                await self._try_build(Place(run=run, clock=clock))

    async def _try_plain_shell(self, guest: Guest, clock: Callable[[], float]) -> Probe:
        """The same as `_try_shell` without Python."""
        name = self._machine.name

        def words(probe: Probe) -> str:
            return f"{probe.kernel} on {probe.machine}"

        probe = await self._check("run a command", lambda: probe_plain(guest, name, clock), words)
        size = format_size(EXCHANGED)
        await self._check("send a file and get it back", lambda: exchange_plain(guest, name, EXCHANGED), lambda _: size)
        return probe

    async def _try_shell(self, guest: Shell, clock: Callable[[], float] | None = None) -> Probe:
        """A command, and a file there and back."""
        name = self._machine.name

        def words(probe: Probe) -> str:
            return f"Linux {probe.kernel} on {probe.machine}, Python {probe.python}"

        probe = await self._check("run a command", lambda: probe_ssh(guest, name, clock or time.time), words)
        size = format_size(EXCHANGED)
        await self._check("send a file and get it back", lambda: exchange_file(guest, name), lambda _: size)
        return probe

    def _note_clock(self, probe: Probe, expected: float) -> None:
        """One that is off is a failure, for no build would be started."""
        shown = format_date(datetime.fromtimestamp(expected + probe.clock_offset_s, UTC))
        hint = "a clock that is off by more than two minutes is not built by"
        self._note("clock", f"{shown}, {format_offset(probe.clock_offset_s)}", probe.clock_fault, hint)

    def _note_systems(self, machine: SshMachine, probe: Probe) -> None:
        """Whether its file says the truth; what it does not run by itself it may emulate."""
        foreign = [system for system in machine.systems if system not in systems_of(probe.machine)]
        words = f"{', '.join(foreign)}: not what {probe.machine} runs by itself; emulation must be set up there"
        self._note("systems", words if foreign else ", ".join(machine.systems))

    def _note_probe(self, probe: Probe) -> None:
        """Load, memory and disk, as far as it tells them."""
        threshold = self._machine.overload_threshold
        if probe.load is not None:
            over = f", over its threshold {threshold:g}: taken last" if threshold is not None and probe.load > threshold else ""
            self._note("load", f"{probe.load:.2f} for each of {probe.cores} {'core' if probe.cores == 1 else 'cores'}{over}")
        if probe.memory_mib is not None:
            self._note("memory", f"{format_size(probe.memory_mib << 20)} available")
        if probe.disk_free is not None:
            self._note("disk", f"{format_size(probe.disk_free)} free")

    async def _look_here(self) -> None:
        async def look() -> Probe:
            return await trio.to_thread.run_sync(probe_local, self._shop.paths.state)

        probe = await self._check("look at this host", look, lambda probe: f"Linux {probe.kernel} on {probe.machine}")
        self._note_probe(probe)
        self._note("sandbox", "bubblewrap works", probe.sandbox, "offload doctor")
        if probe.sandbox:
            raise _Stopped

    async def _try_local(self) -> None:
        await self._look_here()
        service = LocalService(self._shop.paths.state / "work")
        await self._try_build(Place(run=partial(run_build, service), clock=time.time))

    async def _try_binfmt(self, machine: BinfmtMachine) -> None:
        await self._look_here()
        status, native = read_status(), native_systems()
        wanted = machine.systems or find_usable(status, native).systems
        if not wanted:
            self._note("registered", "", "nothing is registered", "offload binfmt register")
        for name in wanted:
            with suppress(_Stopped):
                await self._check(name, partial(_try_emulator, status, name), str)

    async def _try_build(self, place: Place) -> None:
        """A build that gives back what it was sent."""

        def words(report: Report) -> str:
            said = report.started
            kernel = f"{said.get('system', 'Linux')} {said.get('kernel', '')}"[:100]
            return f"succeeded on {kernel} in {format_duration(report.duration_s)}"

        await self._check("build", lambda: self._build(place), words)

    async def _build(self, place: Place) -> Report:
        sent = os.urandom(EXCHANGED)
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self._shop.paths.state) as name:
            folder = Path(name)
            _write_source(folder / "source.tar", sent, int(place.clock()))
            job = Job(
                build=f"test-{secrets.token_hex(4)}",
                name="trial-0",
                steps=("cp sent back",),
                env={},
                outputs=("back",),
                source=folder / "source.tar",
                environment=place.environment,
                set_clock=None,
                expected_clock=place.clock,
                timeout_s=BUILD_S,
                max_silent_s=BUILD_S,
                keep_failed=False,
            )
            listener = _Listener()
            with open_outputs_receiver(folder / "outputs.tar") as outputs:
                report = await place.run(job, outputs, listener)
            if report.exit_status:
                raise HostError(f"a build ended with exit status {report.exit_status}", detail=listener.text)
            if await trio.to_thread.run_sync(read_output, folder / "outputs.tar") != sent:
                raise ProtocolError("a build gave back something else than it was sent")
            return report


def _write_source(path: Path, content: bytes, moment: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("sent")
        member.size, member.mtime = len(content), moment
        tar.addfile(member, io.BytesIO(content))


def read_output(path: Path) -> bytes:
    """The file `back`, or as much of it as tells that it is another one.  Blocks.

    Raises:
        ProtocolError: it is no tar of ours.
    """
    back = b""
    try:
        with path.open("rb") as file:
            tar = TarReader(file)
            for member in tar:
                pieces = tar.content() if member.name == "back" else iter(())
                while len(back) <= EXCHANGED and (piece := next(pieces, b"")):
                    back += piece
    except TarError as exc:
        raise ProtocolError(f"what a build gave back is refused: {exc}") from exc
    return back


async def _try_emulator(status: Status, system: str) -> str:
    """What the emulator of a system type says of itself.

    Raises:
        HostError: it is not registered, or does not run.
    """
    entry = status.find(system)
    if fault := find_fault(status, SYSTEMS[system]):
        raise HostError(fault)
    assert entry is not None
    try:
        with trio.fail_after(EMULATOR_S):
            done = await trio.run_process([entry.interpreter, "--version"], capture_stdout=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError, trio.TooSlowError) as exc:
        raise HostError(f"{entry.interpreter} does not run: {exc}") from exc
    lines = done.stdout.decode(errors="replace").splitlines()
    return f"{entry.interpreter}: {lines[0] if lines else '?'}"


class _Listener:
    """Keeps the end of what the build says."""

    text = ""

    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def collecting(self) -> None: ...

    def log(self, text: str) -> None:
        self.text = (self.text + text)[-4096:]
