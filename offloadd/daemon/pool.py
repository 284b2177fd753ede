"""Clones that wait, paused, for builds to take them: `warm: N` in a machine's file.

Each is a task from its making to its end, as what it consists of is entered and left in one.  Whoever takes it says when it has
done with it.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
import trio

from offloadd.daemon.guests import NO_CLONE, FreshGuest, Guests, open_fresh
from offloadd.daemon.host_memory import HostMemory, read_host_memory
from offloadd.daemon.keeping import Facts, Idle, Want, judge_pool
from offloadd.daemon.own_fault import own_fault
from offloadd.errors import BootError, HostError, MachineLostError, OffloadError
from offloadd.guest.open import set_clock
from offloadd.model.machine import VmMachine
from offloadd.nursery import open_narrow_nursery
from offloadd.place.vm import MOUNTED, mount_environment
from offloadd.place.warm_up import warm_up
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress, silent
from offloadd.template.key import plan_template, template_key
from offloadd.vm.instance import Instance, while_running

LOOK_S = 2.0
"""Between two looks at the host's memory while clones wait or are wanted."""
REST_S = 60.0
"""The same while there are none, for the templates in memory; and after a clone has failed until it is tried again."""

log = structlog.get_logger()


class WaitingClone:
    """A clone that nobody has taken yet; afterwards, what ties it to who has."""

    def __init__(self, want: Want, guest: FreshGuest) -> None:
        self.guest = guest
        self.idle = Idle(name=guest.instance.name, machine=want.machine, digest=want.digest, since=trio.current_time())
        self.taken = trio.Event()
        self.done_with = trio.Event()
        self.ended = trio.Event()

    @property
    def instance(self) -> Instance:
        return self.guest.instance

    @property
    def image(self) -> str:
        """The image's digest."""
        return self.instance.record.plan.boot.digest

    async def wait_over(self) -> str:
        """Wait until it waits no more; what it died of, empty when somebody has taken it or given it up."""
        died = ""

        async def watch(wait: Callable[[], Awaitable[object]], what: str) -> None:
            nonlocal died
            await wait()
            died = what
            nursery.cancel_scope.cancel()

        async with open_narrow_nursery() as nursery:
            nursery.start_soon(watch, self.instance.wait_ended, "its QEMU has ended")
            nursery.start_soon(watch, self.guest.agent.wait_lost, "its agent is gone")
            nursery.start_soon(watch, self.taken.wait, "")
            nursery.start_soon(watch, self.done_with.wait, "")
        return died


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    want: Want
    plan: VmPlan
    environment: Path
    """The disk of the last build's; the next one may well be in the same."""

    def is_of(self, images: Collection[str], templates: Collection[str]) -> bool:
        return self.plan.boot.digest in images or self.want.digest in templates


@dataclass(frozen=True, kw_only=True)
class _Making:
    """One that is made."""

    wanted: _Wanted
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Pool:
    """All clones that wait.  Made by `open_pool` alone.

    Args:
        nursery: owns their tasks.
        look: says how much memory the host has.
    """

    def __init__(self, guests: Guests, nursery: trio.Nursery, look: Callable[[], HostMemory]) -> None:
        self._guests = guests
        self._shop = guests.shop
        self._nursery = nursery
        self._look = look
        self._waiting: dict[str, WaitingClone] = {}
        self._wanted: dict[str, _Wanted] = {}
        """By the machine's name."""
        self._making: _Making | None = None
        self._failed: dict[str, float] = {}
        """Template -> when a clone of it has failed."""
        self._last_move = self._last_short = float("-inf")
        self._woken = trio.Event()

    def waiting(self) -> Sequence[WaitingClone]:
        """Those that nobody has taken yet, the oldest first."""
        return list(self._waiting.values())

    @asynccontextmanager
    async def open(
        self, plan: VmPlan, machine: VmMachine, environment: Path, tell: Progress, *, logs: Path
    ) -> AsyncIterator[FreshGuest]:
        """A fresh guest for a build: one that waits, else as `Guests.open`, which has the other arguments and the errors.

        Args:
            environment: the disk of the build's, which those that wait next will have mounted.
        """
        async with AsyncExitStack() as stack:
            self._last_move = trio.current_time()
            guest = await self._take(stack, plan, machine, logs)
            if guest is None:
                opened = self._guests.open(plan, machine, tell, logs=logs, purpose="build")
                guest = await stack.enter_async_context(opened)
            self._note_use(plan, machine, environment, cloned=guest.origin != "boot")
            try:
                yield guest
            finally:
                self._last_move = trio.current_time()

    async def forget(self, *, images: Collection[str] = (), templates: Collection[str] = ()) -> None:
        """End those that wait and were made of one of these (digests), and make no more of them."""
        self._wanted = {name: one for name, one in self._wanted.items() if not one.is_of(images, templates)}
        making = self._making
        if making and making.wanted.is_of(images, templates):
            making.scope.cancel()
            await making.ended.wait()
        ending = [clone for clone in self.waiting() if clone.image in images or clone.idle.digest in templates]
        self._give_up(clone.idle.name for clone in ending)
        for clone in ending:
            await clone.ended.wait()

    # A build takes one

    async def _take(self, stack: AsyncExitStack, plan: VmPlan, machine: VmMachine, logs: Path) -> FreshGuest | None:
        """One that waits, for as long as `stack` is open; None when there is none."""
        while (clone := self._pick(plan)) is not None:
            async with AsyncExitStack() as attempt:
                try:
                    guest = await attempt.enter_async_context(self._hand_over(clone, plan, logs))
                except (*NO_CLONE, HostError) as exc:
                    log.warning("a waiting clone is of no use", machine=machine.name, why=str(exc))
                    continue
                await self._guests.equip(guest, machine)
                stack.push_async_exit(attempt.pop_all())
                return guest
        return None

    def _pick(self, plan: VmPlan) -> WaitingClone | None:
        """Take one out: from here on nobody else can."""
        machines = {clone.idle.machine for clone in self._waiting.values()}
        if plan.machine not in machines:
            return None
        digest = template_key(plan).digest
        for name, clone in self._waiting.items():
            if (clone.idle.machine, clone.idle.digest) == (plan.machine, digest):
                clone.taken.set()
                return self._waiting.pop(name)
        return None

    @asynccontextmanager
    async def _hand_over(self, clone: WaitingClone, plan: VmPlan, logs: Path) -> AsyncIterator[FreshGuest]:
        instance, agent = clone.instance, clone.guest.agent
        try:
            with self._shop.cores.share(plan.cpu_count) as cores:
                await instance.pin(cores)
                await instance.hand_over(plan, "build", logs)
                agent.machine = plan.instance
                await set_clock(agent, instance.record.clock())
                yield replace(clone.guest, origin="warm")
        finally:
            clone.done_with.set()
            with trio.CancelScope(shield=True):
                await clone.ended.wait()

    def _note_use(self, plan: VmPlan, machine: VmMachine, environment: Path, *, cloned: bool) -> None:
        if not machine.warm or not cloned:
            self._wanted.pop(machine.name, None)
            return
        digest, now = template_key(plan).digest, trio.current_time()
        want = Want(machine=machine.name, digest=digest, count=machine.warm, memory_mib=plan.memory_mib, used=now)
        self._wanted[machine.name] = _Wanted(want=want, plan=plan, environment=environment)
        self._woken.set()

    # Beside the builds

    async def run(self) -> None:
        """Make them, and give them up, until cancelled."""
        while True:
            self._woken = trio.Event()
            if not self._wanted and not self._waiting:
                with trio.move_on_after(REST_S):
                    await self._woken.wait()
            await trio.sleep(LOOK_S)
            self._work()

    def _work(self) -> None:
        """One look."""
        now = trio.current_time()
        verdict = judge_pool(self._facts(now))
        if verdict.short:
            self._last_short = now
        self._give_up(verdict.give_up)
        self._shop.templates.drop_idle(verdict.unload_s)
        wanted = self._wanted[verdict.make.machine] if verdict.make else None
        if wanted and self._shop.templates.is_ready(wanted.want.digest):
            self._making = _Making(wanted=wanted)
            self._nursery.start_soon(self._own, self._making)
        elif wanted:
            # Nobody waits for it: it is not worth a boot.
            del self._wanted[wanted.want.machine]

    def _facts(self, now: float) -> Facts:
        self._failed = {digest: when for digest, when in self._failed.items() if now - when < REST_S}
        return Facts(
            now=now,
            memory=self._look(),
            idle=[clone.idle for clone in self._waiting.values()],
            wants=[wanted.want for wanted in self._wanted.values()],
            last_move=self._last_move,
            last_short=self._last_short,
            making=self._making is not None,
            failed=self._failed,
        )

    def _give_up(self, names: Iterable[str]) -> None:
        for name in names:
            log.info("a waiting clone is given up", instance=name)
            self._waiting.pop(name).done_with.set()

    async def _own(self, making: _Making) -> None:
        """One clone from its making to its end."""
        machine, digest = making.wanted.want.machine, making.wanted.want.digest
        clone: WaitingClone | None = None
        try:
            with making.scope:
                async with AsyncExitStack() as stack:
                    clone = await self._make(stack, making.wanted)
                    self._making = None
                    await self._wait_out(clone)
        except (OffloadError, OSError) as exc:
            if clone is None or not clone.taken.is_set():
                self._failed[digest] = trio.current_time()
            log.warning("a waiting clone has failed", machine=machine, why=str(exc))
        except Exception as exc:
            self._failed[digest] = trio.current_time()
            own_fault(exc, machine)
        finally:
            if clone is None:
                self._making = None
            else:
                clone.ended.set()
            making.ended.set()

    async def _wait_out(self, clone: WaitingClone) -> None:
        """Until nobody needs it any more; `MachineLostError` when it dies before anybody has taken it."""
        name = clone.idle.name
        self._waiting[name] = clone
        try:
            log.info("a clone waits", machine=clone.idle.machine, instance=name)
            died = await clone.wait_over()
        finally:
            self._waiting.pop(name, None)
        if died and not clone.taken.is_set():
            raise MachineLostError(died, subject=name)
        await clone.done_with.wait()

    async def _make(self, stack: AsyncExitStack, wanted: _Wanted) -> WaitingClone:
        """A clone that is paused, and has run what every build runs: the emulator has translated that."""
        # Its clock is the template's, so that no file in it is newer than what is built there.
        shop, plan = self._shop, plan_template(wanted.plan, f"warm-{secrets.token_hex(4)}")
        saved = await stack.enter_async_context(self._guests.template(wanted.plan, silent))
        with shop.cores.share(plan.cpu_count) as cores:
            opened = open_fresh(shop, plan, silent, cores=cores, logs=None, purpose="warm", saved=saved)
            guest = await stack.enter_async_context(opened)
            async with while_running(guest.instance, BootError):
                guest = replace(guest, environment=await _show(guest, wanted.environment))
                await warm_up(guest.agent, MOUNTED if guest.environment else None)
            await guest.instance.pause()
        return WaitingClone(wanted.want, guest)


async def _show(guest: FreshGuest, environment: Path) -> Path | None:
    """Have the guest mount the environment's disk; None when that is gone."""
    try:
        await mount_environment(guest.instance, guest.agent, environment)
    except HostError:
        return None
    return environment


@asynccontextmanager
async def open_pool(guests: Guests, look: Callable[[], HostMemory] = read_host_memory) -> AsyncIterator[Pool]:
    """A pool that is empty at first; leaving the block ends all that wait."""
    async with trio.open_nursery() as nursery:
        pool = Pool(guests, nursery, look)
        nursery.start_soon(pool.run)
        try:
            yield pool
        finally:
            nursery.cancel_scope.cancel()
