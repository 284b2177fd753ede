"""One running QEMU, owned by one block.

    async with open_instance(plan, ...) as instance:      started, pinned, let go; leaving the block ends it
        await instance.stop()                             politely, then firmly

`open_paused_instance` is the same block for one that is let go later.

QEMU itself outlives a daemon that was killed; `adopt_instance` is the same block for one that is found again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from offloadd.bridge import Bridge
from offloadd.errors import (
    BootError,
    HostError,
    MachineLostError,
    OffloadError,
    PortTakenError,
    RebootedError,
    TransientError,
    UnsavableError,
)
from offloadd.nursery import open_narrow_nursery
from offloadd.plan.argv import InstanceFiles
from offloadd.plan.machine import VmPlan
from offloadd.plan.target import find_target
from offloadd.vm.console import bound_logs, console_tail
from offloadd.vm.drives import Drives
from offloadd.vm.home import Home
from offloadd.vm.launch import Memory, launch
from offloadd.vm.memory import SavedGuest
from offloadd.vm.outcome import Outcome, find_panic, judge
from offloadd.vm.pinning import pin
from offloadd.vm.ports import check_ports_free, parse_usernet
from offloadd.vm.process import QemuProcess, find_process
from offloadd.vm.qmp import Qmp, open_qmp
from offloadd.vm.record import InstanceRecord, Purpose, read_record, read_records, write_record
from offloadd.vm.screen import serve_screen, take_screenshot

POLITE_S = 30.0
"""For the guest to power off; under TCG with its processors shared it takes a few seconds."""
QUIT_S = 5.0
KILL_S = 5.0
PANIC_LOOK_S = 1.0
CONTACT_S = 30.0
"""For a QEMU that starts, or is found again, to answer on its monitor."""

MAX_REASON = 300
"""Characters of QEMU's last words in one line."""

# QEMU names the register too, `CPUID.01H:ECX.pcid`; the last word is the flag that -cpu understands.
_MISSING_FEATURE = re.compile(r"doesn't support requested feature: CPUID\S*?\.(?:\S*\.)?(\S+)")


class Instance:
    """A running QEMU.  Made by `open_paused_instance` and `adopt_instance` alone."""

    def __init__(self, record: InstanceRecord, home: Home, process: QemuProcess, qmp: Qmp) -> None:
        self.record = record
        self._home = home
        self.outcome: Outcome | None = None
        self._target = find_target(record.plan.system)
        self._process = process
        self._qmp = qmp
        self._drives = Drives(qmp, record.plan.disk_slots)
        self._asked = False
        self._fault = ""
        self._ended = trio.Event()

    @property
    def name(self) -> str:
        return self.record.plan.instance

    @property
    def files(self) -> InstanceFiles:
        return self._home.files

    def port(self, guest: int) -> int:
        """The host's port that leads to the guest's."""
        return self.record.ports[guest]

    @property
    def ssh_port(self) -> int:
        """The host's port that leads to the guest's sshd."""
        assert self.record.ssh_port is not None
        return self.record.ssh_port

    async def wait_ended(self) -> Outcome:
        """Wait for the end, whoever brings it about."""
        await self._ended.wait()
        assert self.outcome is not None
        return self.outcome

    async def stop(self, *, polite_s: float = POLITE_S) -> Outcome:
        """The power button where there is one, then `quit`, then SIGKILL, each with a limit.

        Args:
            polite_s: how long the guest may take; 0 for a guest that nobody will miss.
        """
        self._asked = True
        polite = polite_s > 0 and self._target.power_button
        if polite and await self._ends_after("system_powerdown", polite_s):
            return await self.wait_ended()
        if not await self._ends_after("quit", QUIT_S):
            self._process.kill()
        with trio.move_on_after(KILL_S):
            return await self.wait_ended()
        raise HostError("QEMU does not end after SIGKILL", subject=self.name, hint=f"look at process {self._process.pid}")

    async def _ends_after(self, command: str, limit_s: float) -> bool:
        with trio.move_on_after(limit_s):
            with suppress(MachineLostError):  # it may end before it answers
                await self._qmp.execute(command)
            await self._ended.wait()
        return self._ended.is_set()

    async def pause(self) -> None:
        """Stop the guest's processors and its clock."""
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        await self._qmp.execute("cont")

    async def let_go(self) -> None:
        """Have the guest run by its plan; one that goes on from somewhere still shows the time that it showed there.

        Raises:
            MachineLostError.
        """
        self._note(clock_offset=self.record.plan.date.timestamp() - time.monotonic(), began=time.time())
        await self.resume()

    async def pin(self, cores: Sequence[int]) -> None:
        """Move the virtual CPUs to these cores of the host.

        Raises:
            HostError, MachineLostError.
        """
        await pin(self._qmp, cores)
        self._note(cores=tuple(cores))

    async def hand_over(self, plan: VmPlan, purpose: Purpose, logs: Path) -> None:
        """Let it go, where it is paused, as the instance of another plan, one that the same template serves.

        Args:
            logs: the directory that gets its logs.
        Raises:
            HostError, MachineLostError.
        """
        try:
            self._home.move(plan.instance, logs)
        except OSError as exc:
            raise HostError(f"cannot move its files: {exc.strerror}", subject=plan.instance) from exc
        self._qmp.instance = plan.instance
        self.record = replace(self.record, plan=plan, purpose=purpose)
        await self.let_go()

    def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        write_record(self.files.record, self.record)

    async def save(self, state: int) -> None:
        """Write the state of the devices to the file behind the descriptor `state`, and pause for good.

        The memory is in its own file already.
        Raises:
            UnsavableError: QEMU cannot; the text says why.
            MachineLostError: QEMU went away.
        """
        await self._qmp.execute("stop")
        await self._leave_memory_out()
        await self._qmp.give(state, "state")
        try:
            await self._qmp.execute("migrate", uri="fd:state")
        except MachineLostError as exc:
            if await self._qmp.answers():
                raise UnsavableError(exc.what, subject=self.name) from exc
            raise
        with trio.move_on_after(CONTACT_S):
            while (status := await self._qmp.execute("query-migrate")).get("status") not in ("completed", "failed"):  # noqa: ASYNC110
                await trio.sleep(0.005)
            if status["status"] == "completed":
                return
            raise UnsavableError(f"QEMU cannot save it: {status.get('error-desc', 'no reason')}", subject=self.name)
        raise MachineLostError(f"QEMU did not save it within {CONTACT_S:.0f} s", subject=self.name)

    async def take_over(self, saved: SavedGuest) -> None:
        """Stand, paused, where another instance was saved.

        Raises:
            MachineLostError: QEMU refuses it; the text says why.
        """
        try:
            await self._load(saved)
        except MachineLostError as exc:
            # A QEMU that does not like what it reads says so, and ends.
            with trio.move_on_after(2):
                outcome = await self.wait_ended()
                why = "; ".join(outcome.stderr.splitlines())[:MAX_REASON] or outcome.reason
                what = f"QEMU does not go on from what was saved: {why}"
                raise MachineLostError(what, subject=self.name, detail=outcome.detail) from exc
            raise

    async def _load(self, saved: SavedGuest) -> None:
        await self._leave_memory_out()
        # Opened anew: with a position of its own.
        state = os.open(f"/proc/self/fd/{saved.state}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            await self._qmp.give(state, "state")
        finally:
            os.close(state)
        await self._qmp.execute("migrate-incoming", uri="fd:state")
        with trio.move_on_after(CONTACT_S):
            while (await self._qmp.execute("query-status")).get("status") == "inmigrate":  # noqa: ASYNC110
                await trio.sleep(0.002)
            return
        raise MachineLostError(f"QEMU did not take over the saved guest within {CONTACT_S:.0f} s", subject=self.name)

    async def _leave_memory_out(self) -> None:
        """Of what is saved: it is in a file that both share."""
        capability = {"capability": "x-ignore-shared", "state": True}
        await self._qmp.execute("migrate-set-capabilities", capabilities=[capability])

    async def attach_disk(self, path: Path, *, writable: bool = False) -> str:
        """Put a raw image file into a free drive; the serial by which the guest finds it.

        QEMU keeps the file open: its name may be removed.
        Raises:
            HostError: it cannot be opened.
            MachineLostError: all drives are taken; QEMU refused it or went away.
        """
        return await self._drives.put_in(path, writable=writable)

    async def detach_disk(self, slot: str) -> None:
        """Take it out again: the guest must have let go of it, or reads zeros from there on."""
        await self._drives.take_out(slot)

    async def screenshot(self) -> bytes:
        """What its screen shows now, as PNG.

        Raises:
            NotFoundError: it has none.
            MachineLostError, ProtocolError: QEMU went away, or wrote no picture.
        """
        return await take_screenshot(self._qmp)

    def console_tail(self, lines: int = 20) -> str:
        return console_tail(self.files.console_log, lines)

    async def _end_when_disk_full(self) -> None:
        """QEMU pauses a guest that it cannot write for; nobody would ever know why it is silent."""
        try:
            await self._qmp.wait_disk_full()
        except MachineLostError:
            return  # its end is seen by others
        await self._end_for("the host's disk is full: what the guest wrote has no room")

    async def _end_when_panicked(self) -> None:
        """Mach has no device to tell of a panic, and waits for long before it starts again."""
        while (panic := find_panic(self.console_tail())) is None:  # noqa: ASYNC110 - nothing tells that a file has grown
            await trio.sleep(PANIC_LOOK_S)
        await self._end_for(f"the guest's kernel panicked: {panic}")

    async def _end_for(self, fault: str) -> None:
        """At once, unless its disk stays: what QEMU still holds of what the guest wrote is written out by `quit`."""
        self._fault = fault
        if self.record.plan.volatile or not await self._ends_after("quit", QUIT_S):
            self._process.kill()

    async def _watch(self, scope: trio.CancelScope) -> None:
        with scope:
            status = await self._process.wait_ended()
            events = await self._qmp.take_last_events()
            self.outcome = judge(
                events,
                asked=self._asked,
                fault=self._fault,
                exit_status=status,
                stderr=_stderr(self.files.qemu_log),
                console=console_tail(self.files.console_log, lines=200),
            )
            self._ended.set()

    async def _end(self) -> None:
        """Whatever happened: no QEMU is left when the block is.

        What the guest itself has not written to its disk yet is lost: whoever wants it stops the guest before.
        """
        if not self._ended.is_set():
            with trio.CancelScope(shield=True):
                await self.stop(polite_s=0)


@asynccontextmanager
async def open_instance(
    plan: VmPlan,
    *,
    instances: Path,
    logs: Path | None,
    bridge: Bridge,
    cores: Sequence[int],
    purpose: Purpose,
    memory: Memory = None,
) -> AsyncIterator[Instance]:
    """Start QEMU for `plan`, let the guest go, and end it with the block: as `open_paused_instance`, which says the rest."""
    opened = open_paused_instance(
        plan, instances=instances, logs=logs, bridge=bridge, cores=cores, purpose=purpose, memory=memory
    )
    async with opened as instance:
        if isinstance(memory, SavedGuest):
            await instance.take_over(memory)
        await instance.let_go()
        yield instance


@asynccontextmanager
async def open_paused_instance(
    plan: VmPlan,
    *,
    instances: Path,
    logs: Path | None,
    bridge: Bridge,
    cores: Sequence[int],
    purpose: Purpose,
    memory: Memory = None,
) -> AsyncIterator[Instance]:
    """Start QEMU for `plan` and end it with the block.  Its guest has not run yet.

    Args:
        instances: the directory below which the instance's own is made.
        logs: the directory that gets its console log and QEMU's messages when it has ended; None: nobody wants them.
        cores: the host core of each virtual CPU.
        memory: what the guest will `take_over`, or where it will be saved.
    Raises:
        PortTakenError, HostError, BootError: it did not start; nothing is left of it.
    """
    home = Home(InstanceFiles(instances / plan.instance), logs)
    files = home.files
    check_ports_free(plan.instance, [host for host, _ in plan.forwards if host], read_records(instances))
    try:
        files.directory.mkdir(mode=0o700, parents=True)
    except FileExistsError as exc:
        raise PortTakenError("runs already", subject=plan.instance, hint=f"offload vm stop {plan.instance}") from exc
    async with AsyncExitStack() as stack:
        stack.callback(home.put_away)
        process = launch(plan, files, memory)
        stack.push_async_callback(process.end, KILL_S)
        # Before anything can go wrong: whatever becomes of us, the next daemon finds it.
        write_record(files.record, InstanceRecord.of_paused(plan, process, cores, purpose))
        qmp = await stack.enter_async_context(_first_contact(plan, files, process, bridge))
        record = await _settle(plan, files, process, qmp, cores, purpose)
        async with _supervised(Instance(record, home, process, qmp)) as instance:
            yield instance


@asynccontextmanager
async def adopt_instance(directory: Path, *, logs: Path, bridge: Bridge) -> AsyncIterator[Instance | None]:
    """The block for an instance that an earlier daemon started; None when it has ended meanwhile, and its rest is put away."""
    home = Home(InstanceFiles(directory), logs)
    files = home.files
    record = read_record(files.record)
    process = find_process(record.pid, record.started) if record else None
    async with AsyncExitStack() as stack:
        stack.callback(home.put_away)
        if record is None or process is None:
            if record is None:
                await _end_unrecorded(files, bridge)
            yield None
            return
        stack.push_async_callback(process.end, KILL_S)
        qmp = await _reach(stack, bridge, files, record.plan.instance)
        if record.began:
            # The earlier daemon may have been killed right before it did this; and a disk that was full may have room again.
            await qmp.execute("cont")
        async with _supervised(Instance(record, home, process, qmp)) as instance:
            with suppress(MachineLostError):  # its end is seen by others
                # The builds that the earlier daemon ran in it have ended with that.
                await instance._drives.clear()
            yield instance


async def _reach(stack: AsyncExitStack, bridge: Bridge, files: InstanceFiles, instance: str) -> Qmp:
    try:
        with trio.fail_after(CONTACT_S):
            return await stack.enter_async_context(open_qmp(bridge, files.qmp, instance))
    except trio.TooSlowError as exc:
        raise MachineLostError("QEMU's monitor does not answer", subject=instance) from exc


async def _end_unrecorded(files: InstanceFiles, bridge: Bridge) -> None:
    """End a QEMU whose daemon was killed before it could write down the process: its monitor is all that leads to it."""
    with trio.move_on_after(CONTACT_S), suppress(MachineLostError):
        async with open_qmp(bridge, files.qmp, files.directory.name) as qmp:
            await qmp.execute("quit")


@asynccontextmanager
async def _supervised(instance: Instance) -> AsyncIterator[Instance]:
    # A cancellation from outside must not end the watch: `_end` waits for what it sees.
    watching = trio.CancelScope(shield=True)
    async with open_narrow_nursery() as nursery:
        nursery.start_soon(instance._watch, watching)
        nursery.start_soon(instance._end_when_disk_full)
        if instance._target.panics_unseen:
            nursery.start_soon(instance._end_when_panicked)
        if instance.record.plan.has_screen:
            nursery.start_soon(serve_screen, instance._qmp, instance.files.vnc)
        nursery.start_soon(bound_logs, lambda: (instance.files.console_log, instance.files.qemu_log))
        try:
            yield instance
        finally:
            try:
                await instance._end()
            finally:
                watching.cancel()
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def while_running(instance: Instance, error: type[OffloadError]) -> AsyncIterator[None]:
    """Run the block as long as the instance runs: its end cancels the block and is raised as `error`, with the last words.

    A block that fails because the instance is just ending (a lost connection is seen first) raises `error` too.
    """

    def ended(outcome: Outcome) -> OffloadError:
        hint = f"offload vm logs {instance.record.plan.machine}"
        kind = RebootedError if outcome.rebooted and error is BootError else error
        return kind(f"the machine {outcome.state}: {outcome.reason}", subject=instance.name, detail=outcome.detail, hint=hint)

    async def watch() -> None:
        raise ended(await instance.wait_ended())

    async with open_narrow_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            yield
        except TransientError as exc:
            with trio.move_on_after(2):
                raise ended(await instance.wait_ended()) from exc
            raise
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _first_contact(plan: VmPlan, files: InstanceFiles, process: QemuProcess, bridge: Bridge) -> AsyncIterator[Qmp]:
    """QMP; when QEMU ended instead, its exit status and its last words say more than the lost socket."""
    async with AsyncExitStack() as stack:
        try:
            qmp = await _reach(stack, bridge, files, plan.instance)
        except MachineLostError as exc:
            status: int | None = None
            with trio.move_on_after(2):
                status = await process.wait_ended()
            raise BootError(
                f"QEMU did not start (exit status {status})",
                subject=plan.instance,
                detail=_stderr(files.qemu_log),
                hint="offload doctor; `options` in the machine's file go to QEMU as they are",
            ) from exc
        yield qmp


async def _settle(
    plan: VmPlan, files: InstanceFiles, process: QemuProcess, qmp: Qmp, cores: Sequence[int], purpose: Purpose
) -> InstanceRecord:
    """Pin the paused VM's threads and note what QEMU has made of the plan."""
    await pin(qmp, cores)
    return replace(
        InstanceRecord.of_paused(plan, process, cores, purpose),
        ports=parse_usernet(await qmp.human("info usernet")),
        missing_features=missing_features(files.qemu_log.read_text(errors="replace")),
    )


def missing_features(stderr: str) -> tuple[str, ...]:
    """The CPU features that QEMU warns about: the model has them, the accelerator does not."""
    return tuple(dict.fromkeys(_MISSING_FEATURE.findall(stderr)))


def _stderr(log: Path) -> str:
    """QEMU's last words without the warnings that are told elsewhere."""
    lines = console_tail(log, lines=200).splitlines()
    return "\n".join([line for line in lines if not _MISSING_FEATURE.search(line)][-10:])
