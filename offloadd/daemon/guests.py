"""Guests that nobody has used before: cloned from a template, or booted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import structlog
import trio

from offloadd.daemon.workshop import Workshop
from offloadd.errors import (
    AgentError,
    BootError,
    HostError,
    ImageError,
    MachineLostError,
    NotAllowedError,
    OffloadError,
    ProtocolError,
    RebootedError,
    UnsavableError,
)
from offloadd.guest.agent import Agent, open_agent
from offloadd.guest.open import boot_twice, install_secrets, open_by_ssh, open_guest, personalize, wake
from offloadd.guest.ssh import Guest
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import VmMachine
from offloadd.model.quantity import format_duration
from offloadd.place.warm_up import warm_up
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress
from offloadd.template.freeze import Workbench, freeze
from offloadd.template.key import TemplateKey, plan_template, template_key
from offloadd.unchanged import Signature
from offloadd.vm.home import log_folder
from offloadd.vm.instance import Instance, open_instance, open_paused_instance
from offloadd.vm.memory import SavedGuest
from offloadd.vm.record import Purpose

Origin = Literal["boot", "clone", "warm"]

NO_CLONE = (BootError, MachineLostError, AgentError, ProtocolError, ImageError)
"""What a clone that did not come to life ends with; a boot is tried then."""

KEEP_TEMPLATES_S = 30 * 24 * 3600.0
"""Templates of which nobody made a guest for this long are dropped,"""
MAX_TEMPLATES = 60
"""and those used longest ago where there are more; each takes some 150 MB."""

REFUSED_S = 3600.0
"""Until a guest that QEMU could not save is tried again: it may have been the host, short of something for a moment."""

REBOOT_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before a childhurd that rebooted instead of taking its secrets is started again, each time."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class FreshGuest:
    """A guest of one's own."""

    instance: Instance
    agent: Agent
    origin: Origin
    mounted: Signature = ()
    """The disk of an environment that it shows at `place.vm.MOUNTED`, as it was then; empty: none."""
    why_booted: str = ""
    """Why it is no clone, where it should have been one."""


@dataclass(frozen=True, kw_only=True)
class SshGuest:
    """A guest that others have made, and that we are logged in to."""

    instance: Instance
    shell: Guest | None
    """None: it has no account for us."""


@asynccontextmanager
async def open_fresh(
    shop: Workshop,
    plan: VmPlan,
    tell: Progress,
    *,
    cores: Sequence[int],
    logs: Path | None,
    purpose: Purpose,
    saved: SavedGuest | None,
) -> AsyncIterator[FreshGuest]:
    """A guest that was booted, or goes on from `saved`, and is no other's twin.

    Raises:
        BootError, AgentError, ProtocolError, MachineLostError, HostError.
    """
    if saved is None:
        opened = open_instance(
            plan, instances=shop.paths.instances, logs=logs, bridge=shop.bridge, cores=cores, purpose=purpose
        )
        async with opened as instance, open_guest(instance, lambda text: tell(text, None)) as agent:
            await personalize(instance, agent)
            yield FreshGuest(instance=instance, agent=agent, origin="boot")
        return
    async with open_paused_clone(shop, plan, saved, cores=cores, logs=logs, purpose=purpose) as guest:
        await guest.instance.let_go()
        await wake(guest.instance, guest.agent, lambda text: tell(text, None))
        yield guest


@asynccontextmanager
async def open_paused_clone(
    shop: Workshop, plan: VmPlan, saved: SavedGuest, *, cores: Sequence[int], logs: Path | None, purpose: Purpose
) -> AsyncIterator[FreshGuest]:
    """A guest that stands where the template was saved, its siblings' twin: to be let go, and then to be woken.

    Raises:
        BootError, AgentError, MachineLostError, HostError.
    """
    started = open_paused_instance(
        plan, instances=shop.paths.instances, logs=logs, bridge=shop.bridge, cores=cores, purpose=purpose, memory=saved
    )
    # Connected first, as the one that was saved was: a guest that finds it otherwise is told, and looks after its port.
    async with started as instance, open_agent(instance.files.agent, instance.name) as agent:
        await instance.take_over(saved)
        yield FreshGuest(instance=instance, agent=agent, origin="clone")


_Start = Callable[[AsyncExitStack, SavedGuest | None], Awaitable[FreshGuest]]


@dataclass
class Guests:
    """Makes them."""

    shop: Workshop
    _refused: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Templates that QEMU cannot save: why, and when it was tried."""

    @asynccontextmanager
    async def open(
        self, plan: VmPlan, machine: VmMachine, tell: Progress, *, logs: Path, purpose: Purpose
    ) -> AsyncIterator[FreshGuest]:
        """A fresh guest for the length of the block.

        Args:
            tell: is told what is done, and why a guest had to be booted.
            logs: the directory that gets its console log.
        Raises:
            BootError, AgentError, ProtocolError, MachineLostError, HostError, ImageError: there is none to be had.
        """

        async def start(stack: AsyncExitStack, saved: SavedGuest | None) -> FreshGuest:
            cores = stack.enter_context(self.shop.cores.share(plan.cpu_count))

            async def once() -> FreshGuest:
                opened = open_fresh(self.shop, plan, tell, cores=cores, logs=logs, purpose=purpose, saved=saved)
                return await stack.enter_async_context(opened)

            return await boot_twice(once, lambda text: tell(text, None))

        async with AsyncExitStack() as stack:
            found = await self._try_clone(stack, plan, tell, start) if machine.template else ""
            if isinstance(found, FreshGuest):
                guest = found
            else:
                if found:
                    tell(found, None)
                    log.warning("no clone", machine=machine.name, why=found)
                tell(f"booting {machine.name}", None)
                guest = replace(await start(stack, None), why_booted=found)
            if purpose == "build":
                await self.equip(guest, machine)
            yield guest

    @asynccontextmanager
    async def open_by_ssh(
        self,
        plan: VmPlan,
        machine: VmMachine,
        tell: Progress,
        *,
        logs: Path,
        purpose: Purpose,
        booted: Callable[[Instance], None] = lambda instance: None,
    ) -> AsyncIterator[SshGuest]:
        """A guest that boots from a disk of its own, without our agent, for the length of the block.

        A childhurd that got no secrets reboots: it is started again, after a pause that grows.

        Args:
            booted: is given each instance as soon as it runs.
        Raises:
            BootError, HostError, PortTakenError: QEMU did not start; the guest did not come up, or rebooted too often.
            ConfigError: a file of its secret root cannot be sent.
            ProtocolError, SshError: it is not the guest that it should be.
        """
        pauses = REBOOT_PAUSES_S if isinstance(machine, Childhurd) else ()
        shop, secrets = self.shop, self.shop.secrets(machine)

        async def boot(stack: AsyncExitStack) -> SshGuest:
            tell(f"booting {plan.machine}", None)
            cores = stack.enter_context(shop.cores.share(plan.cpu_count))
            started = open_instance(
                plan, instances=shop.paths.instances, logs=logs, bridge=shop.bridge, cores=cores, purpose=purpose
            )
            instance = await stack.enter_async_context(started)
            booted(instance)
            admitted = open_by_ssh(instance, secrets, shop.bridge, lambda text: tell(text, None))
            return SshGuest(instance=instance, shell=await stack.enter_async_context(admitted))

        async with AsyncExitStack() as stack:
            for pause in (*pauses, None):
                async with AsyncExitStack() as attempt:
                    try:
                        guest = await boot(attempt)
                    except RebootedError as exc:
                        if not pauses:
                            raise
                        if pause is None:
                            raise _reboots_always(exc, machine) from exc
                    else:
                        stack.push_async_exit(attempt.pop_all())
                        break
                tell(f"it rebooted before it was ready: starting it again in {format_duration(pause or 0)}", None)
                await trio.sleep(pause or 0)
            yield guest

    async def equip(self, guest: FreshGuest, machine: VmMachine) -> None:
        """Give a build's guest what its machine's file names."""
        if machine.secret_root:
            # Nobody logs in there: it gets no keys for that.
            await install_secrets(guest.agent, self.shop.secrets(machine).root, without="/etc/ssh/")

    async def _try_clone(self, stack: AsyncExitStack, plan: VmPlan, tell: Progress, start: _Start) -> FreshGuest | str:
        """A clone, or why there can be none."""
        key = template_key(plan)
        why, tried = self._refused.get(key.digest, ("", 0.0))
        if why and trio.current_time() - tried < REFUSED_S:
            return f"no template: {why}"
        async with AsyncExitStack() as attempt:
            try:
                saved = await attempt.enter_async_context(self.template(plan, tell))
            except UnsavableError as exc:
                self._refused[key.digest] = exc.what, trio.current_time()
                return f"no template: {exc}"
            except (MachineLostError, AgentError, ProtocolError, ImageError, HostError) as exc:
                return f"no template: {exc}"
            try:
                guest = await start(attempt, saved)
            except NO_CLONE as exc:
                await attempt.aclose()
                with suppress(NotAllowedError):  # another daemon makes it anew right now
                    await self.shop.templates.discard(saved)
                return f"the template is of no use: {exc}"
            stack.push_async_exit(attempt.pop_all())
            return guest

    @asynccontextmanager
    async def template(self, plan: VmPlan, tell: Progress, *, rebuild: bool = False) -> AsyncIterator[SavedGuest]:
        """The template for `plan`, made when it is missing.

        Raises:
            BootError: the guest that is to be saved did not come up.
            AgentError, ProtocolError: it does not do what it is asked for.
            UnsavableError: QEMU cannot save it.
            MachineLostError: QEMU went away.
            ImageError, HostError: it cannot be kept.
        """
        key = template_key(plan)
        if rebuild:
            await self.shop.templates.remove(key.digest)
        async with self.shop.templates.open(key.digest, partial(self._make, plan, key, tell), tell) as saved:
            self._refused.pop(key.digest, None)
            yield saved

    async def _make(self, plan: VmPlan, key: TemplateKey, tell: Progress, directory: Path) -> None:
        shop, name = self.shop, f"template-{key.digest[:12]}"
        with shop.cores.share(plan.cpu_count) as cores:
            logs = log_folder(shop.paths.logs / plan.machine, "-template")
            bench = Workbench(instances=shop.paths.instances, logs=logs, bridge=shop.bridge, cores=cores)
            try:
                await freeze(plan_template(plan, name), key, bench, warm_up, directory, tell)
            except OffloadError as exc:
                # It is the machine that its user knows.
                exc.subject = plan.machine
                raise
        # Each date may want a CPU of its own: what was made once must not lie there for ever.
        try:
            await shop.templates.drop_old(KEEP_TEMPLATES_S, MAX_TEMPLATES)
        except (OffloadError, OSError) as exc:  # that is no fault of the one that was made
            log.warning("old templates stay", why=str(exc))


def _reboots_always(last: RebootedError, machine: VmMachine) -> BootError:
    what = f"rebooted {len(REBOOT_PAUSES_S) + 1} times before anybody could log in"
    hint = f"it does that when it gets no secrets that it understands: offload secrets show {machine.name}"
    return BootError(what, subject=last.subject, detail=last.detail, hint=hint)
