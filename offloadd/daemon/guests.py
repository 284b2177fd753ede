"""Guests that nobody has used before: cloned from a template, or booted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

import structlog

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
    UnsavableError,
)
from offloadd.guest.agent import Agent
from offloadd.guest.open import install_secrets, open_guest, personalize
from offloadd.model.machine import VmMachine
from offloadd.place.warm_up import warm_up
from offloadd.plan.machine import VmPlan
from offloadd.process import Progress
from offloadd.template.freeze import Workbench, freeze
from offloadd.template.key import TemplateKey, plan_template, template_key
from offloadd.vm.instance import Instance, open_instance
from offloadd.vm.memory import SavedGuest
from offloadd.vm.record import Purpose

Origin = Literal["boot", "clone", "warm"]

NO_CLONE = (BootError, MachineLostError, AgentError, ProtocolError)
"""What a clone that did not come to life ends with; a boot is tried then."""

KEEP_TEMPLATES_S = 30 * 24 * 3600.0
"""Templates of which nobody made a guest for this long are dropped,"""
MAX_TEMPLATES = 60
"""and those used longest ago where there are more; each takes some 150 MB."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class FreshGuest:
    """A guest of one's own."""

    instance: Instance
    agent: Agent
    origin: Origin
    environment: Path | None = None
    """Its disk, which the guest has mounted at `place.vm.MOUNTED`; None: none."""


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
    opened = open_instance(
        plan, instances=shop.paths.instances, logs=logs, bridge=shop.bridge, cores=cores, purpose=purpose, memory=saved
    )
    async with opened as instance, open_guest(instance, lambda text: tell(text, None)) as agent:
        await personalize(instance, agent)
        yield FreshGuest(instance=instance, agent=agent, origin="boot" if saved is None else "clone")


@dataclass
class Guests:
    """Makes them."""

    shop: Workshop
    _refused: dict[str, str] = field(default_factory=dict)
    """Templates that QEMU cannot save, and why."""

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
        async with AsyncExitStack() as stack:
            guest = await self._try_clone(stack, plan, machine, tell, logs, purpose) if machine.template else None
            if guest is None:
                tell(f"booting {machine.name}", None)
                guest = await self._start(stack, plan, tell, logs, purpose, None)
            if purpose == "build":
                await self.equip(guest, machine)
            yield guest

    @asynccontextmanager
    async def open_bare(self, plan: VmPlan, tell: Progress, *, logs: Path, purpose: Purpose) -> AsyncIterator[Instance]:
        """A guest that boots from a disk of its own, without our agent; it has no secrets yet.

        Raises:
            BootError, HostError, PortTakenError: QEMU did not start.
        """
        tell(f"booting {plan.machine}", None)
        shop = self.shop
        with shop.cores.share(plan.cpu_count) as cores:
            opened = open_instance(
                plan, instances=shop.paths.instances, logs=logs, bridge=shop.bridge, cores=cores, purpose=purpose
            )
            async with opened as instance:
                yield instance

    async def equip(self, guest: FreshGuest, machine: VmMachine) -> None:
        """Give a build's guest what its machine's file names."""
        if machine.secret_root:
            # Nobody logs in there: it gets no keys for that.
            await install_secrets(guest.agent, self.shop.secrets(machine).root, without="/etc/ssh/")

    async def _start(
        self, stack: AsyncExitStack, plan: VmPlan, tell: Progress, logs: Path, purpose: Purpose, saved: SavedGuest | None
    ) -> FreshGuest:
        cores = stack.enter_context(self.shop.cores.share(plan.cpu_count))
        opened = open_fresh(self.shop, plan, tell, cores=cores, logs=logs, purpose=purpose, saved=saved)
        return await stack.enter_async_context(opened)

    async def _try_clone(
        self, stack: AsyncExitStack, plan: VmPlan, machine: VmMachine, tell: Progress, logs: Path, purpose: Purpose
    ) -> FreshGuest | None:
        """A clone, or None when there can be none; whoever follows is told why."""
        key = template_key(plan)
        if key.digest in self._refused:
            tell(f"no template: {self._refused[key.digest]}", None)
            return None
        async with AsyncExitStack() as attempt:
            try:
                saved = await attempt.enter_async_context(self.template(plan, tell))
            except UnsavableError as exc:
                self._refused[key.digest] = exc.what
                _note(machine, f"no template: {exc}", tell)
                return None
            except (MachineLostError, AgentError, ProtocolError, ImageError, HostError) as exc:
                _note(machine, f"no template: {exc}", tell)
                return None
            try:
                guest = await self._start(attempt, plan, tell, logs, purpose, saved)
            except NO_CLONE as exc:
                _note(machine, f"the template is of no use: {exc}", tell)
                await attempt.aclose()
                with suppress(NotAllowedError):  # another daemon makes it anew right now
                    await self.shop.templates.discard(saved)
                return None
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
            began = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
            logs = shop.paths.logs / plan.machine / f"{began}-template"
            bench = Workbench(instances=shop.paths.instances, logs=logs, bridge=shop.bridge, cores=cores)
            try:
                await freeze(plan_template(plan, name), key, bench, warm_up, directory, tell)
            except OffloadError as exc:
                # It is the machine that its user knows.
                exc.subject = plan.machine
                raise
        # Each date may want a CPU of its own: what was made once must not lie there for ever.
        await shop.templates.drop_old(KEEP_TEMPLATES_S, MAX_TEMPLATES)


def _note(machine: VmMachine, what: str, tell: Progress) -> None:
    tell(what, None)
    log.warning("no clone", machine=machine.name, why=what)
