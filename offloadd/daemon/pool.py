"""Clones that wait, paused, for builds to take them: one that is only started, and those of `warm: N` in a machine's file.

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

from offloadd.daemon.guests import NO_CLONE, FreshGuest, Guests, open_paused_clone
from offloadd.daemon.host_memory import HostMemory, read_host_memory
from offloadd.daemon.keeping import Facts, Idle, Kind, Want, judge_pool
from offloadd.daemon.own_fault import own_fault
from offloadd.errors import BootError, HostError, MachineLostError, OffloadError
from offloadd.guest.open import set_clock, wake
from offloadd.model.machine import VmMachine
from offloadd.nursery import open_narrow_nursery
from offloadd.place.vm import MOUNTED, mount_environment
from offloadd.place.warm_up import warm_up
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress, silent
from offloadd.template.key import plan_template, template_key
from offloadd.unchanged import Signature, sign
from offloadd.vm.instance import Instance, while_running

LOOK_S = 2.0
"""Between two looks at the host's memory while clones wait or are wanted."""
REST_S = 60.0
"""The same while there are none, for the templates in memory; and after a clone has failed until it is tried again."""
PAUSE_S = 0.3
"""From a build's beginning, or its end, to the look that it brings about: the build goes on first."""

log = structlog.get_logger()


class WaitingClone:
    """A clone that nobody has taken yet; afterwards, what ties it to who has."""

    def __init__(self, want: Want, guest: FreshGuest) -> None:
        self.guest = guest
        name, since = guest.instance.name, trio.current_time()
        self.idle = Idle(name=name, machine=want.machine, kind=want.kind, digest=want.digest, since=since)
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
    """What the last build on a machine had."""

    digest: str
    """Of the template."""
    plan: VmPlan
    warm: int
    environment: Path
    """Its disk; the next one may well be in the same."""
    used: float

    def is_of(self, images: Collection[str], templates: Collection[str]) -> bool:
        return self.plan.boot.digest in images or self.digest in templates

    def wants(self) -> Sequence[Want]:
        # Options may name what one QEMU alone can have, as a port: such a machine has clones that wait when its file says so.
        counts: dict[Kind, int] = {"started": 0 if self.plan.options else 1, "warm": self.warm}
        machine, memory = self.plan.machine, self.plan.memory_mib
        return [
            Want(machine=machine, kind=kind, digest=self.digest, count=count, memory_mib=memory, used=self.used)
            for kind, count in counts.items()
        ]


@dataclass(frozen=True, kw_only=True)
class _Making:
    """One that is made."""

    want: Want
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
        self.guests = guests
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
            guest = await self._take(stack, plan, machine, tell, logs) if machine.template else None
            if guest is None:
                opened = self.guests.open(plan, machine, tell, logs=logs, purpose="build")
                guest = await stack.enter_async_context(opened)
            self._note_use(plan, machine, environment, cloned=guest.origin != "boot")
            try:
                yield guest
            finally:
                self._last_move = trio.current_time()
                self._woken.set()

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

    async def _take(
        self, stack: AsyncExitStack, plan: VmPlan, machine: VmMachine, tell: Progress, logs: Path
    ) -> FreshGuest | None:
        """One that waits, for as long as `stack` is open; None when there is none."""
        while (clone := self._pick(plan)) is not None:
            async with AsyncExitStack() as attempt:
                try:
                    guest = await attempt.enter_async_context(self._hand_over(clone, plan, tell, logs))
                except (*NO_CLONE, HostError) as exc:
                    log.warning("a waiting clone is of no use", machine=machine.name, why=str(exc))
                    continue
                await self.guests.equip(guest, machine)
                stack.push_async_exit(attempt.pop_all())
                return guest
        return None

    def _pick(self, plan: VmPlan) -> WaitingClone | None:
        """Take one out, a warm one first: from here on nobody else can."""
        mine = [clone for clone in self._waiting.values() if clone.idle.machine == plan.machine]
        digest = template_key(plan).digest if mine else ""
        for clone in sorted(mine, key=lambda clone: clone.idle.kind != "warm"):
            if clone.idle.digest == digest:
                clone.taken.set()
                return self._waiting.pop(clone.idle.name)
        return None

    @asynccontextmanager
    async def _hand_over(self, clone: WaitingClone, plan: VmPlan, tell: Progress, logs: Path) -> AsyncIterator[FreshGuest]:
        instance, agent = clone.instance, clone.guest.agent
        try:
            with self._shop.cores.share(plan.cpu_count) as cores:
                await instance.pin(cores)
                await instance.hand_over(plan, "build", logs)
                agent.machine = plan.instance
                if clone.idle.kind == "warm":
                    await set_clock(agent, instance.record.clock())
                else:
                    await wake(instance, agent, lambda text: tell(text, None))
                yield clone.guest
        finally:
            clone.done_with.set()
            with trio.CancelScope(shield=True):
                await clone.ended.wait()

    def _note_use(self, plan: VmPlan, machine: VmMachine, environment: Path, *, cloned: bool) -> None:
        if not cloned:
            self._wanted.pop(machine.name, None)
            return
        digest, now = template_key(plan).digest, trio.current_time()
        self._wanted[machine.name] = _Wanted(digest=digest, plan=plan, warm=machine.warm, environment=environment, used=now)
        self._woken.set()

    # Beside the builds

    async def run(self) -> None:
        """Make them, and give them up, until cancelled."""
        while True:
            self._woken = trio.Event()
            with trio.move_on_after(LOOK_S if self._wanted or self._waiting else REST_S):
                await self._woken.wait()
            await trio.sleep(PAUSE_S)
            self._work()

    def _work(self) -> None:
        """One look."""
        now = trio.current_time()
        verdict = judge_pool(self._facts(now))
        if verdict.short:
            self._last_short = now
        self._give_up(verdict.give_up)
        self._shop.templates.drop_idle(verdict.unload_s)
        if verdict.make is None:
            return
        want = verdict.make
        if self._shop.templates.is_ready(want.digest):
            self._making = _Making(want=want, wanted=self._wanted[want.machine])
            self._nursery.start_soon(self._own, self._making)
        else:
            # Nobody waits for it: it is not worth a boot.
            del self._wanted[want.machine]

    def _facts(self, now: float) -> Facts:
        self._failed = {digest: when for digest, when in self._failed.items() if now - when < REST_S}
        return Facts(
            now=now,
            memory=self._look(),
            idle=[clone.idle for clone in self._waiting.values()],
            wants=[want for wanted in self._wanted.values() for want in wanted.wants()],
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
        machine, digest = making.want.machine, making.want.digest
        clone: WaitingClone | None = None
        try:
            with making.scope:
                async with AsyncExitStack() as stack:
                    clone = await self._make(stack, making)
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
            log.info("a clone waits", machine=clone.idle.machine, instance=name, kind=clone.idle.kind)
            died = await clone.wait_over()
        finally:
            self._waiting.pop(name, None)
        if died and not clone.taken.is_set():
            raise MachineLostError(died, subject=name)
        await clone.done_with.wait()

    async def _make(self, stack: AsyncExitStack, making: _Making) -> WaitingClone:
        """A clone that is paused."""
        # Its clock is the template's, so that no file in it is newer than what is built there.
        shop, wanted = self._shop, making.wanted
        plan = plan_template(wanted.plan, f"warm-{secrets.token_hex(4)}")
        saved = await stack.enter_async_context(self.guests.template(wanted.plan, silent))
        with shop.cores.share(plan.cpu_count) as cores:
            opened = open_paused_clone(shop, plan, saved, cores=cores, logs=None, purpose="warm")
            guest = await stack.enter_async_context(opened)
            if making.want.kind == "warm":
                guest = await _warm(guest, wanted.environment)
        return WaitingClone(making.want, guest)


async def _warm(guest: FreshGuest, environment: Path) -> FreshGuest:
    """Have it run what every build runs, which the emulator translates, and pause it again."""
    instance, agent = guest.instance, guest.agent
    await instance.let_go()
    await wake(instance, agent, lambda text: None)
    async with while_running(instance, BootError):
        mounted = await _show(guest, environment)
        await warm_up(agent, MOUNTED if mounted else None)
    await instance.pause()
    return replace(guest, origin="warm", mounted=mounted)


async def _show(guest: FreshGuest, environment: Path) -> Signature:
    """Have the guest mount the environment's disk; empty when that is gone."""
    disk = sign([environment])
    try:
        await mount_environment(guest.instance, guest.agent, environment)
    except HostError:
        return ()
    return disk


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
