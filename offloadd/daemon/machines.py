"""The machines that their users start: each one task, from "starting" to its end."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog
import trio

from offloadd.daemon.guests import Guests
from offloadd.daemon.own_fault import own_fault
from offloadd.daemon.workshop import Workshop
from offloadd.errors import (
    AgentError,
    BootError,
    CancelledError,
    ConfigError,
    DaemonError,
    HostError,
    MachineLostError,
    NotFoundError,
    OffloadError,
)
from offloadd.guest.agent import Agent
from offloadd.guest.open import install_secrets, open_by_ssh, open_guest, personalize, start_sshd
from offloadd.guest.secret_root import SecretRoot, ensure_secret_root
from offloadd.guest.ssh import open_ssh
from offloadd.model.machine import Childhurd, VmMachine
from offloadd.model.state import MachineState
from offloadd.nursery import open_narrow_nursery
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress, host_error, silent
from offloadd.vm.instance import Instance, adopt_instance
from offloadd.vm.record import InstanceRecord, read_record

LOST_S = 2.0
SYNC_S = 60.0
"""For a guest to write what its disk still lacks, which it has not written for half a minute at most."""
KEPT_LOGS = 10
"""Runs of a machine whose console logs are kept."""

log = structlog.get_logger()


class RunningMachine:
    """One machine between its start and its end."""

    def __init__(self, name: str, declared: VmMachine | None) -> None:
        self.name = name
        self.declared = declared
        """As it was when it was started; None for one that was found again while the configuration is wrong."""
        self.instance: Instance | None = None
        self.guest: Agent | None = None
        """None while it boots, while the connection to it is made again, and always for one that has no agent."""
        self.ready = False
        """Whether it can be used now."""
        self.was_ready = False
        self.secrets: SecretRoot | None = None
        self.error: OffloadError | None = None
        self.phase: tuple[str, float | None] = ("starting", None)
        self.scope = trio.CancelScope()
        self.changed = trio.lowlevel.ParkingLot()
        self.ended = trio.Event()

    def tell(self, text: str, fraction: float | None = None) -> None:
        self.phase = (text, fraction)
        self.changed.unpark_all()


async def _then_cancel(wait: Callable[[], Awaitable[object]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()


async def _ends_soon(instance: Instance) -> bool:
    """Has it ended?  A killed QEMU is seen by its connections first: its end gets a moment to be known."""
    with trio.move_on_after(LOST_S):
        await instance.wait_ended()
    return instance.outcome is not None


class Machines:
    """All machines that run for their users.  `nursery` owns their tasks."""

    def __init__(self, workshop: Workshop, guests: Guests, nursery: trio.Nursery) -> None:
        self._workshop = workshop
        self._guests = guests
        self._nursery = nursery
        self._running: dict[str, RunningMachine] = {}
        self._closed = False

    def refuse_new(self) -> None:
        """The daemon is about to end."""
        self._closed = True

    def __len__(self) -> int:
        return len(self._running)

    def find(self, name: str) -> RunningMachine | None:
        """The machine when it is ready to be used."""
        found = self._running.get(name)
        return found if found and found.ready else None

    def instance(self, name: str) -> Instance:
        """The QEMU of a machine that runs, ready or not.

        Raises:
            NotFoundError: it does not run.
        """
        found = self._running.get(name) or self._running.get(self._workshop.library().vm(name).name)
        if found is None or found.instance is None:
            raise NotFoundError("does not run", subject=name, hint=f"offload vm start {name}")
        return found.instance

    def declared(self) -> dict[str, VmMachine]:
        """Those that run, as they were when they were started: their files may be gone or wrong by now."""
        return {name: running.declared for name, running in self._running.items() if running.declared is not None}

    async def start(self, name: str, progress: Progress = silent) -> RunningMachine:
        """Start the machine, or join a start that is under way; returns when one can talk to it.

        Raises:
            NotFoundError, ConfigError, NoMachineError, HostError, ImageError, BootError, ...
        """
        if self._closed:
            raise DaemonError("the daemon is being stopped", subject=name, hint="try again in a moment")
        machine = self._workshop.library().vm(name)
        name = machine.name  # it may have been asked for by another one
        running = self._running.get(name)
        if running is None:
            running = self._running[name] = RunningMachine(name, machine)
            self._nursery.start_soon(self._own, running, machine)
        while not running.ready:
            progress(*running.phase)
            if running.ended.is_set():
                raise running.error or CancelledError("was stopped while it started", subject=name)
            await running.changed.park()
        return running

    async def stop(self, name: str) -> None:
        """Stop the machine politely and wait for its end.

        Raises:
            NotFoundError: it does not run.
        """
        # By its own name also when its file is gone or wrong by now.
        running = self._running.get(name) or self._running.get(self._workshop.library().vm(name).name)
        if running is None:
            raise NotFoundError("does not run", subject=name, hint=f"offload vm start {name}")
        name = running.name
        self._move(name, MachineState.STOPPING)
        if running.instance is not None and running.was_ready:
            await self._write_out(running, running.instance)
            await running.instance.stop()
        else:
            running.scope.cancel()
        await running.ended.wait()

    async def _write_out(self, running: RunningMachine, instance: Instance) -> None:
        """Have a guest without a power button, whose disk stays, write what it still holds in memory."""
        if instance.record.plan.volatile or running.secrets is None or not running.secrets.has_account:
            return
        with trio.move_on_after(SYNC_S), suppress(OffloadError):  # it may have ended, or refuse everybody by now
            async with open_ssh(self._workshop.bridge, instance.ssh_port, running.secrets) as guest:
                await guest.run("sync")

    async def stop_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for name in list(self._running):
                nursery.start_soon(self._stop_surely, name)

    async def _stop_surely(self, name: str) -> None:
        try:
            await self.stop(name)
        except NotFoundError:
            pass  # it has just ended by itself
        except OffloadError as exc:
            log.error("machine not stopped", machine=name, error=str(exc))

    async def _own(self, running: RunningMachine, machine: VmMachine) -> None:
        name = running.name
        self._move(name, MachineState.STARTING)
        log.info("machine starting", machine=name)
        try:
            with running.scope:
                await self._boot_and_wait(running, machine)
        except OffloadError as exc:
            running.error = exc
        except OSError as exc:
            running.error = host_error(exc, name, self._workshop.paths.state)
        except Exception as exc:
            # It must not take the builds and the other machines along.
            running.error = own_fault(exc, name)
        finally:
            self._forget(running)

    async def _boot_and_wait(self, running: RunningMachine, machine: VmMachine) -> None:
        shop = self._workshop
        plan = await shop.plan(machine, shop.library(), running.tell)
        running.secrets = shop.secrets(machine)
        if not plan.boot.has_agent:
            await self._own_bare(running, machine, plan)
            return
        logs = self._log_folder(machine.name)
        async with self._guests.open(plan, machine, running.tell, logs=logs, purpose="machine") as guest:
            running.instance = guest.instance
            await self._open_to_users(running, guest.agent)
            await self._be_ready(running, guest.instance, guest.agent)
            await self._serve(running, guest.instance, fresh=False)

    async def _open_to_users(self, running: RunningMachine, agent: Agent) -> None:
        assert running.secrets is not None
        running.tell("installing its secrets")
        await install_secrets(agent, running.secrets.root)
        running.tell("waiting for sshd")
        await start_sshd(agent)

    async def _serve(self, running: RunningMachine, instance: Instance, *, fresh: bool) -> None:
        """Connect again and again until its end.

        Args:
            fresh: nobody can log in yet.
        """
        while not await _ends_soon(instance):
            try:
                async with open_guest(instance, running.tell, adopted=True) as agent:
                    if fresh:
                        await personalize(instance, agent)
                        await self._open_to_users(running, agent)
                        fresh = False
                    await self._be_ready(running, instance, agent)
            except (AgentError, BootError):
                # A guest that powers off loses its connection first: that end is no failed boot.
                if not running.was_ready or not await _ends_soon(instance):
                    raise

    async def _own_bare(self, running: RunningMachine, machine: VmMachine, plan: VmPlan) -> None:
        """The same for a guest without an agent: from the moment that one can log in, until its end.

        A childhurd that reboots is started again.
        """
        reboots = True
        while reboots:
            logs = self._log_folder(machine.name)
            opened = self._guests.open_by_ssh(
                plan, machine, running.tell, logs=logs, purpose="machine", booted=partial(setattr, running, "instance")
            )
            async with opened as guest:
                await self._be_ready(running, guest.instance, None)
            reboots = self._starts_again(running, machine, guest.instance)

    def _starts_again(self, running: RunningMachine, machine: VmMachine, instance: Instance) -> bool:
        """Whether it has ended by a reboot of its guest's, which QEMU makes its end."""
        rebooted = instance.outcome is not None and instance.outcome.rebooted
        if not rebooted or not isinstance(machine, Childhurd):
            return False
        log.info("machine reboots", machine=running.name)
        self._move(running.name, MachineState.STOPPED_BY_GUEST, "rebooted from inside the guest")
        self._move(running.name, MachineState.STARTING)
        running.was_ready = False
        return True

    async def _serve_adopted(self, running: RunningMachine, instance: Instance) -> None:
        """What an earlier daemon has started, without an agent."""
        assert running.secrets is not None
        if not running.was_ready:
            async with open_by_ssh(instance, running.secrets, self._workshop.bridge, running.tell, adopted=True):
                pass
        await self._be_ready(running, instance, None)

    async def _be_ready(self, running: RunningMachine, instance: Instance, agent: Agent | None) -> None:
        """Until the instance ends or the connection to its agent breaks."""
        self._move(running.name, MachineState.RUNNING)
        running.guest, running.ready, running.was_ready = agent, True, True
        running.tell("ready", 1.0)
        log.info("machine running", machine=running.name, ports=instance.record.ports)
        try:
            async with open_narrow_nursery() as nursery:
                nursery.start_soon(_then_cancel, instance.wait_ended, nursery.cancel_scope)
                if agent is not None:
                    nursery.start_soon(_then_cancel, agent.wait_lost, nursery.cancel_scope)
        finally:
            running.guest, running.ready = None, False

    def _forget(self, running: RunningMachine) -> None:
        """Note how it ended, whatever the way."""
        outcome = running.instance.outcome if running.instance else None
        if running.error is not None:
            crashed = outcome is not None and outcome.state is MachineState.CRASHED
            # A machine that was running does not become stopped by an error.
            running_before = self._workshop.database.machine(running.name).state is MachineState.RUNNING
            state = MachineState.CRASHED if crashed or running_before else MachineState.STOPPED
            reason, detail = running.error.what, running.error.detail
        elif outcome is not None:
            state, reason, detail = outcome.state, outcome.reason, outcome.detail
        else:
            state, reason, detail = MachineState.STOPPED, "stopped by us", ""
        self._move(running.name, state, reason, detail if state is MachineState.CRASHED or running.error else "")
        log.info("machine ended", machine=running.name, state=str(state), reason=reason)
        running.guest, running.ready = None, False
        del self._running[running.name]
        running.ended.set()
        running.changed.unpark_all()

    def _move(self, name: str, state: MachineState, reason: str = "", detail: str = "") -> None:
        database = self._workshop.database
        if database.machine(name).state is not state:
            try:
                database.move_machine(name, state, reason, detail)
            except HostError as exc:
                log.error("state not stored", machine=name, state=str(state), error=str(exc))
            except ValueError as exc:
                # A guest that powers off while we ask it to: both are true, the first to be seen stays.
                log.warning("state not moved", machine=name, error=str(exc))

    def _log_folder(self, name: str) -> Path:
        folder = self._workshop.paths.logs / name
        for old in sorted(folder.glob("*"))[: -KEPT_LOGS + 1]:
            shutil.rmtree(old, ignore_errors=True)
        return folder / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")

    async def reconcile(self) -> None:
        """Bring what an earlier daemon left to rest: adopt its users' machines, end the machines of its builds."""
        left = sorted(self._workshop.paths.instances.glob("*"))
        names = set()
        for directory in left:
            record = read_record(directory / "instance.json")
            # One that was never let go has nothing in it worth keeping.
            if record is not None and record.began and record.purpose == "machine" and self._declared(record.plan.machine):
                name = record.plan.machine
                names.add(name)
                running = self._running[name] = RunningMachine(name, self._declaration(name))
                self._nursery.start_soon(self._adopt, running, directory, record)
            else:
                await self._end_left(directory)
        for row in self._workshop.database.machines():
            busy = row.state in (MachineState.STARTING, MachineState.RUNNING, MachineState.STOPPING)
            if busy and row.name not in names:
                self._move(row.name, MachineState.CRASHED, "the daemon ended while it ran, and so did it")

    async def _adopt(self, running: RunningMachine, directory: Path, record: InstanceRecord) -> None:
        shop = self._workshop
        try:
            with running.scope, shop.cores.hold(record.cores):
                running.secrets = self._secrets_of(running.name)
                logs = self._log_folder(running.name)
                async with adopt_instance(directory, logs=logs, bridge=shop.bridge) as running.instance:
                    if running.instance is None:
                        raise MachineLostError("ended while no daemon ran", subject=running.name)
                    log.info("machine adopted", machine=running.name, pid=record.pid)
                    # The earlier daemon may have been killed before it sent the secrets.
                    fresh = shop.database.machine(running.name).state is MachineState.STARTING
                    running.was_ready = not fresh
                    if record.plan.boot.has_agent:
                        await self._serve(running, running.instance, fresh=fresh)
                    else:
                        await self._serve_adopted(running, running.instance)
                instance, machine = running.instance, running.declared
                if machine is not None and self._starts_again(running, machine, instance):
                    await self._boot_and_wait(running, machine)
        except OffloadError as exc:
            running.error = exc
        except OSError as exc:
            running.error = host_error(exc, running.name, shop.paths.state)
        finally:
            self._forget(running)

    def _secrets_of(self, name: str) -> SecretRoot:
        """Also when its file has become wrong while it ran: that is no reason to end it."""
        try:
            return self._workshop.secrets(self._workshop.library().vm(name))
        except ConfigError:
            return ensure_secret_root(name, self._workshop.paths.secrets)

    def _declared(self, name: str) -> bool:
        try:
            return name in self._workshop.library().machines
        except ConfigError as exc:
            log.error("the configuration is wrong", error=str(exc))
            return True

    def _declaration(self, name: str) -> VmMachine | None:
        try:
            return self._workshop.library().vm(name)
        except OffloadError:
            return None

    async def _end_left(self, directory: Path) -> None:
        logs = self._workshop.paths.logs / "lost" / directory.name
        try:
            async with adopt_instance(directory, logs=logs, bridge=self._workshop.bridge):
                log.info("ended what an earlier daemon left", instance=directory.name)
        except OffloadError as exc:
            log.warning("ended what an earlier daemon left", instance=directory.name, error=str(exc))
