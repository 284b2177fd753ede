"""The place for a build on the machine that it goes to: in a guest of its own or one that runs, here, on a remote host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from offloadd.builder.debian import BUILDER_PACKAGES
from offloadd.builder.dsc import parse_dsc
from offloadd.daemon.active import ActiveBuild, Move
from offloadd.daemon.guests import Origin
from offloadd.daemon.machines import Machines, RunningMachine
from offloadd.daemon.pool import Pool
from offloadd.daemon.work import Work
from offloadd.daemon.workshop import Workshop
from offloadd.environment.store import Environment
from offloadd.errors import MachineLostError, NoMachineError, SshError, UsageError
from offloadd.guest.ssh import Guest, open_ssh
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import BinfmtMachine, LocalMachine, Machine, SshMachine, VmMachine
from offloadd.model.quantity import format_date
from offloadd.model.state import BuildState
from offloadd.place.childhurd import open_in_childhurd
from offloadd.place.local import open_local_place
from offloadd.place.place import Place
from offloadd.place.remote import open_remote_place
from offloadd.place.vm import open_in_guest
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.vm.instance import Instance

_ORIGINS: dict[Origin, str] = {"boot": "a fresh boot", "clone": "a fresh clone", "warm": "a fresh clone, which was waiting,"}
LOGIN_S = 120.0
"""For a guest whose sshd listens; one handshake takes it seconds when its host is busy."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Opens them."""

    shop: Workshop
    pool: Pool
    machines: Machines
    move: Move
    """Stores a change of a build's state."""

    @asynccontextmanager
    async def open(self, active: ActiveBuild, work: Work, machine: Machine) -> AsyncIterator[Place]:
        """A place that is ready for the build.

        Raises:
            OffloadError: there is none to be had.
        """
        async with AsyncExitStack() as stack:
            if isinstance(machine, SshMachine):
                active.tell(f"logging in to {machine.name}")
                yield await stack.enter_async_context(open_remote_place(machine, self.shop.bridge))
                return
            if isinstance(machine, Childhurd):
                yield await stack.enter_async_context(self._open_childhurd(active, work, machine))
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
        own, plan = await self._plan(active, work, machine)
        if active.request.keep_machine:
            async with self._open_kept(active, machine, own, plan, environment) as place:
                yield place
            return
        self.move(active, BuildState.BOOTING)
        began = trio.current_time()
        opened = self.pool.open(plan, machine, environment.path, active.tell, logs=active.folder)
        async with opened as guest:
            active.result |= {"boot_s": round(trio.current_time() - began, 3), "guest": guest.origin}
            if guest.why_booted:
                active.result["why_booted"] = guest.why_booted
            active.tell(f"{_ORIGINS[guest.origin]} of {machine.name} at {format_date(plan.date)} on {plan.cpu}")
            placed = open_in_guest(guest.instance, guest.agent, environment.path, own=True, mounted=guest.mounted)
            async with placed as place:
                yield place

    async def _plan(self, active: ActiveBuild, work: Work, machine: VmMachine) -> tuple[VmPlan, VmPlan]:
        """The plan with which the machine itself would be started, and that of what the build asks for."""
        shop = self.shop
        own = await shop.plan(machine, shop.library(), active.tell)
        plan = plan_for_build(
            own,
            f"build-{active.id}",
            date=work.date,
            cpu=active.request.asked_cpu,
            pinned_cpu=machine.cpu is not None,
            system=work.system,
        )
        return own, plan

    @asynccontextmanager
    async def _open_childhurd(self, active: ActiveBuild, work: Work, machine: Childhurd) -> AsyncIterator[Place]:
        """A childhurd of the build's own; or the one that runs, where that is asked for or its disk is the only one."""
        own, plan = await self._plan(active, work, machine)
        kept = active.request.keep_machine or not machine.volatile
        if kept and work.date is not None:
            hint = "without a date it is built at the machine's own"
            raise UsageError("keeps its disk, and so is not started at a build's date", subject=machine.name, hint=hint)
        async with AsyncExitStack() as stack:
            if kept:
                instance = (await self._start_kept(active, machine, own, plan)).instance
                assert instance is not None
                shell = await stack.enter_async_context(self._log_in(instance, machine))
            else:
                instance, shell = await self._boot_childhurd(stack, active, machine, plan)
            opened_place = open_in_childhurd(
                instance,
                shell,
                own=not kept,
                log_in_as_root=lambda: self._log_in(instance, machine, user="root"),
                packages=await _guest_packages(active, work, machine),
            )
            yield await stack.enter_async_context(opened_place)

    async def _boot_childhurd(
        self, stack: AsyncExitStack, active: ActiveBuild, machine: Childhurd, plan: VmPlan
    ) -> tuple[Instance, Guest]:
        self.move(active, BuildState.BOOTING)
        began = trio.current_time()
        opened = self.pool.guests.open_by_ssh(plan, machine, active.tell, logs=active.folder, purpose="build")
        guest = await stack.enter_async_context(opened)
        if guest.shell is None:
            hint = "`offloading: true` in its file"
            raise NoMachineError("has no account for builds", subject=machine.name, hint=hint)
        active.result |= {"boot_s": round(trio.current_time() - began, 3), "guest": "boot"}
        active.tell(f"{_ORIGINS['boot']} of {machine.name} at {format_date(plan.date)}")
        return guest.instance, guest.shell

    @asynccontextmanager
    async def _log_in(self, instance: Instance, machine: Childhurd, *, user: str | None = None) -> AsyncIterator[Guest]:
        """Once more, in a guest where somebody could log in already."""
        async with AsyncExitStack() as stack:
            guest = None
            with trio.move_on_after(LOGIN_S):
                opened = open_ssh(self.shop.bridge, instance.ssh_port, self.shop.secrets(machine), user=user)
                guest = await stack.enter_async_context(opened)
            if guest is None:
                raise SshError(f"nobody could log in within {LOGIN_S:.0f} s", subject=machine.name)
            yield guest

    async def _start_kept(self, active: ActiveBuild, machine: VmMachine, own: VmPlan, plan: VmPlan) -> RunningMachine:
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
        active.result |= {"boot_s": 0.0 if was_running else round(trio.current_time() - began, 3), "guest": "kept"}
        active.tell(f"building in {machine.name}, which goes on running")
        return running

    @asynccontextmanager
    async def _open_kept(
        self, active: ActiveBuild, machine: VmMachine, own: VmPlan, plan: VmPlan, environment: Environment
    ) -> AsyncIterator[Place]:
        """The same as a place, where our agent is."""
        running = await self._start_kept(active, machine, own, plan)
        assert running.instance is not None
        if running.guest is None:
            raise MachineLostError("the connection to it has just broken", subject=machine.name, hint="try again")
        async with open_in_guest(running.instance, running.guest, environment.path, own=False) as place:
            yield place


async def _guest_packages(active: ActiveBuild, work: Work, machine: Childhurd) -> tuple[str, ...]:
    """What the guest is to install with its own apt; nothing where it has no network: then it has what it has."""
    if active.request.debian is None or not machine.network:
        return ()
    dsc = next(path for path in work.sources if path.suffix == ".dsc")
    found = parse_dsc(await trio.Path(dsc).read_bytes(), dsc.name)
    return (*BUILDER_PACKAGES, *found.build_depends)


def _check_fits(machine: VmMachine, wanted: VmPlan, running: VmPlan) -> None:
    """Raise `UsageError` when a machine that runs for its user is not what the build asks for."""
    hint = f"without --keep-machine the build gets a fresh guest; or offload vm stop {machine.name}"
    if wanted.cpu != running.cpu:
        raise UsageError(f"has the CPU {running.cpu}, and the build asks for {wanted.cpu}", subject=machine.name, hint=hint)
    # Not their digests: that of a disk that stays changes as its guest writes.  A kept image's path has its digest in it.
    if wanted.boot.disk != running.boot.disk:
        raise UsageError("runs from an older image", subject=machine.name, hint=hint)
    # A machine without a date in its file has that of its start.
    if machine.date not in (None, running.date):
        raise UsageError("was started at another date than its file says now", subject=machine.name, hint=hint)
