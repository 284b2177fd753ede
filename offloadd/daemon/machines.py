"""The machines that their users start: each one task, from "starting" to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial

import structlog
import trio

from offloadd.daemon.guests import REBOOT_PAUSES_S, Guests
from offloadd.daemon.own_fault import own_fault
from offloadd.daemon.workshop import Workshop
from offloadd.errors import AgentError, BootError, CancelledError, DaemonError, HostError, NotFoundError, OffloadError
from offloadd.guest.agent import Agent
from offloadd.guest.open import install_secrets, open_guest, personalize, start_sshd
from offloadd.guest.secret_root import SecretRoot
from offloadd.guest.ssh import open_ssh
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import VmMachine
from offloadd.model.quantity import format_duration
from offloadd.model.state import MachineState
from offloadd.nursery import open_narrow_nursery
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress, host_error, silent
from offloadd.vm.home import log_folder
from offloadd.vm.instance import Instance

LOST_S = 2.0
SYNC_S = 60.0
"""For a guest to write what its disk still lacks, which it has not written for half a minute at most."""
SETTLED_S = 60.0
"""A guest that reboots sooner after it was ready may do that for ever."""

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
        self.stopping = False
        """Whether we end it: then a reboot is its end too."""
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
        found = self._find(name)
        if found is None or found.instance is None:
            raise NotFoundError("does not run", subject=name, hint=f"offload vm start {name}")
        return found.instance

    def _find(self, name: str) -> RunningMachine | None:
        """By its own name also when its file is gone or wrong by now; else as the library calls it."""
        return self._running.get(name) or self._running.get(self._workshop.library().vm(name).name)

    def declared(self) -> dict[str, VmMachine]:
        """Those that run, as they were when they were started: their files may be gone or wrong by now."""
        return {name: running.declared for name, running in self._running.items() if running.declared is not None}

    def names(self) -> Collection[str]:
        """Of all that run, also those of which the file was wrong when they were adopted."""
        return self._running.keys()

    async def start(self, name: str, progress: Progress = silent) -> RunningMachine:
        """Start the machine, or join a start that is under way; returns when one can talk to it.

        Raises:
            NotFoundError, ConfigError, NoMachineError, HostError, ImageError, BootError, ...
        """
        if self._closed:
            raise DaemonError("the daemon is being stopped", subject=name, hint="try again in a moment")
        while (running := self._find(name)) is not None and running.stopping:
            progress("waiting for its end", None)
            await running.ended.wait()
        if running is None:
            machine = self._workshop.library().vm(name)
            running = RunningMachine(machine.name, machine)
            self.own(running, partial(self._start, running, machine))
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
        running = self._find(name)
        if running is None:
            raise NotFoundError("does not run", subject=name, hint=f"offload vm start {name}")
        running.stopping = True  # its guest may reboot while we wait
        self.move(running.name, MachineState.STOPPING)
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
        # It may have ended, or refuse everybody by now; our keys may be gone.
        with trio.move_on_after(SYNC_S), suppress(OffloadError, OSError, ValueError):
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

    def own(self, running: RunningMachine, life: Callable[[], Awaitable[None]]) -> None:
        """Have it among those that run for as long as `life` takes, however that ends."""
        self._running[running.name] = running
        self._nursery.start_soon(self._own, running, life)

    async def _own(self, running: RunningMachine, life: Callable[[], Awaitable[None]]) -> None:
        try:
            with running.scope:
                await life()
        except OffloadError as exc:
            running.error = exc
        except OSError as exc:
            running.error = host_error(exc, running.name, self._workshop.paths.state)
        except Exception as exc:
            # It must not take the builds and the other machines along.
            running.error = own_fault(exc, running.name)
        finally:
            self._forget(running)

    async def _start(self, running: RunningMachine, machine: VmMachine) -> None:
        self.move(running.name, MachineState.STARTING)
        log.info("machine starting", machine=running.name)
        await self.boot_and_wait(running, machine)

    async def boot_and_wait(self, running: RunningMachine, machine: VmMachine) -> None:
        """From its plan to its end."""
        shop = self._workshop
        plan = await shop.plan(machine, shop.library(), running.tell)
        running.secrets = shop.secrets(machine)
        if not plan.boot.has_agent:
            await self._own_bare(running, machine, plan)
            return
        logs = log_folder(self._workshop.paths.logs / machine.name)
        async with self._guests.open(plan, machine, running.tell, logs=logs, purpose="machine") as guest:
            running.instance = guest.instance
            await self._open_to_users(running, guest.agent)
            await self.be_ready(running, guest.instance, guest.agent)
            await self.serve(running, guest.instance, fresh=False)

    async def _open_to_users(self, running: RunningMachine, agent: Agent) -> None:
        assert running.secrets is not None
        running.tell("installing its secrets")
        await install_secrets(agent, running.secrets.root)
        running.tell("waiting for sshd")
        await start_sshd(agent)

    async def serve(self, running: RunningMachine, instance: Instance, *, fresh: bool) -> None:
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
                    await self.be_ready(running, instance, agent)
            except (AgentError, BootError):
                # A guest that powers off loses its connection first: that end is no failed boot.
                if not running.was_ready or not await _ends_soon(instance):
                    raise

    async def _own_bare(self, running: RunningMachine, machine: VmMachine, plan: VmPlan) -> None:
        """The same for a guest without an agent: from the moment that one can log in, until its end.

        A childhurd that reboots is started again.
        """
        soon, again = 0, True
        while again:
            logs = log_folder(self._workshop.paths.logs / machine.name)
            opened = self._guests.open_by_ssh(
                plan, machine, running.tell, logs=logs, purpose="machine", booted=partial(setattr, running, "instance")
            )
            async with opened as guest:
                began = trio.current_time()
                await self.be_ready(running, guest.instance, None)
            soon = soon + 1 if trio.current_time() - began < SETTLED_S else 0
            again = await self.starts_again(running, guest.instance, soon)

    async def starts_again(self, running: RunningMachine, instance: Instance, soon: int = 0) -> bool:
        """Whether it has ended by a reboot of its guest's, which QEMU makes its end, and is to be started again now.

        Args:
            soon: how many times in a row it has ended within `SETTLED_S` of being ready: it waits longer each time.
        Raises:
            BootError: it reboots again and again.
        """
        outcome = instance.outcome
        if outcome is None or not outcome.rebooted or running.stopping or not isinstance(running.declared, Childhurd):
            return False
        if soon > len(REBOOT_PAUSES_S):
            what = f"rebooted {soon} times in a row, each time within {format_duration(SETTLED_S)} of being ready"
            raise BootError(what, subject=running.name, detail=outcome.detail, hint=f"offload vm logs {running.name}")
        log.info("machine reboots", machine=running.name, soon=soon)
        self.move(running.name, MachineState.STOPPED_BY_GUEST, "rebooted from inside the guest")
        self.move(running.name, MachineState.STARTING)
        running.was_ready = False
        if soon:
            pause = REBOOT_PAUSES_S[soon - 1]
            running.tell(f"it rebooted as soon as it was ready: starting it again in {format_duration(pause)}")
            await trio.sleep(pause)
        return True

    async def be_ready(self, running: RunningMachine, instance: Instance, agent: Agent | None) -> None:
        """Until the instance ends or the connection to its agent breaks."""
        self.move(running.name, MachineState.RUNNING)
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
        elif outcome is not None and not (running.stopping and outcome.state is MachineState.STOPPED_BY_GUEST):
            state, reason, detail = outcome.state, outcome.reason, outcome.detail
        else:
            state, reason, detail = MachineState.STOPPED, "stopped by us", ""
        self.move(running.name, state, reason, detail if state is MachineState.CRASHED or running.error else "")
        log.info("machine ended", machine=running.name, state=str(state), reason=reason)
        running.guest, running.ready = None, False
        del self._running[running.name]
        running.ended.set()
        running.changed.unpark_all()

    def move(self, name: str, state: MachineState, reason: str = "", detail: str = "") -> None:
        """Store its state, where that is another one."""
        database = self._workshop.database
        if database.machine(name).state is not state:
            try:
                database.move_machine(name, state, reason, detail)
            except HostError as exc:
                log.error("state not stored", machine=name, state=str(state), error=str(exc))
            except ValueError as exc:
                # A guest that powers off while we ask it to: both are true, the first to be seen stays.
                log.warning("state not moved", machine=name, error=str(exc))
