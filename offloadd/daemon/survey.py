"""What is known of all machines now: what the router decides by, and what `offload machine list` shows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import trio

from offloadd.binfmt.status import find_usable, read_status
from offloadd.breaker import Breaker
from offloadd.daemon.machines import Machines
from offloadd.daemon.probes import Probes
from offloadd.daemon.slots import Slots
from offloadd.daemon.templates import has_template
from offloadd.daemon.workshop import Workshop
from offloadd.errors import HostError, NotAllowedError, NotFoundError, OffloadError
from offloadd.host import native_systems, systems_of
from offloadd.model.childhurd import Childhurd
from offloadd.model.image import FileImage
from offloadd.model.machine import BinfmtMachine, EmulatedVm, LocalMachine, Machine, SshMachine, VmMachine
from offloadd.model.state import MachineMode
from offloadd.model.system import SYSTEMS
from offloadd.nursery import open_narrow_nursery
from offloadd.place.far_side import BWRAP, measure
from offloadd.plan.machine import default_qemu
from offloadd.route import Emulation, MachineFacts
from offloadd.vm.accelerator import known_accelerator

Templates = Sequence[Mapping[str, Any]]
"""What each template is made of."""

log = structlog.get_logger()


class Survey:
    """Looks at machines."""

    def __init__(self, workshop: Workshop, machines: Machines, slots: Slots) -> None:
        self._workshop = workshop
        self._machines = machines
        self._slots = slots
        self.probes = Probes(workshop.bridge, self._note_silent)

    async def facts(
        self, machines: Mapping[str, Machine], *, worth: Callable[[Machine], bool] = lambda machine: True
    ) -> dict[str, MachineFacts]:
        """What is known of each; whom we must log in to is asked side by side, in bounded time, unless it is to be left alone.

        Args:
            worth: whether a remote host or a childhurd is to be asked: one that is dead takes its time.
        """
        here = await trio.to_thread.run_sync(self._look_here)
        templates = await trio.to_thread.run_sync(self._workshop.templates.known)
        found: dict[str, MachineFacts] = {}

        async def look(name: str, machine: Machine) -> None:
            if isinstance(machine, SshMachine) and not worth(machine):
                found[name] = MachineFacts(systems=machine.systems, running=True, **self._counts(name))
                return
            found[name] = MachineFacts(**await self._facts(machine, here, templates), **self._counts(name))
            if isinstance(machine, Childhurd):
                found[name] = replace(found[name], load=await self._load(machine) if worth(machine) else None)

        async with open_narrow_nursery() as nursery:
            for name, machine in machines.items():
                nursery.start_soon(look, name, machine)
        return {name: found[name] for name in machines}

    def set_mode(self, name: str, mode: MachineMode) -> None:
        """Let a machine do more or less; one that may do all again starts without what it failed before."""
        database = self._workshop.database
        database.set_machine_mode(name, mode)
        if mode is MachineMode.ONLINE:
            database.store_breaker(name, Breaker())
        self.probes.forget(name)
        self._slots.wake_all()

    def _note_silent(self, name: str, error: OffloadError) -> None:
        """A host that does not answer is left alone like one that fails builds: each question takes its time."""
        database = self._workshop.database
        database.store_breaker(name, database.breaker(name).after_failure(time.time()))
        log.warning("machine does not answer", machine=name, error=str(error))

    def check_online(self, name: str) -> None:
        """Raise `NotAllowedError` when the machine is offline: nobody is to talk to it."""
        if self._workshop.database.machine_mode(name) is MachineMode.OFFLINE:
            raise NotAllowedError("is offline", subject=name, hint=f"offload machine resume {name}")

    def _look_here(self) -> dict[str, Any]:
        """What this host has to spare, and its environments."""
        measured = measure(str(self._workshop.paths.state))
        return {
            "load": measured["load"] / measured["cores"],
            "memory_mib": measured["memory_mib"],
            "disk_free": measured["disk_free"],
            "kernel": os.uname().release,
            "environments": self._workshop.environments.digests(),
        }

    def _counts(self, name: str) -> dict[str, Any]:
        """What the daemon keeps of any machine."""
        database = self._workshop.database
        return {"mode": database.machine_mode(name), "breaker": database.breaker(name), "busy": self._slots.busy(name)}

    async def _facts(self, machine: Machine, here: dict[str, Any], templates: Templates) -> dict[str, Any]:
        """What depends on the machine's kind."""
        match machine:
            case LocalMachine():
                return {**here, **_local_facts(machine), "running": True}
            case BinfmtMachine():
                return {**here, **await trio.to_thread.run_sync(_binfmt_facts, machine), "running": True}
            case VmMachine():
                return {**here, **await self._vm_facts(machine, here, templates)}
            case SshMachine():
                return await self._ssh_facts(machine)
        raise TypeError(f"no survey knows the kind {machine.kind}")

    async def _vm_facts(self, machine: VmMachine, here: dict[str, Any], templates: Templates) -> dict[str, Any]:
        binary = default_qemu(machine)
        path = shutil.which(binary)
        kvm = path is not None and not isinstance(machine, EmulatedVm) and self._has_kvm(path)
        digest, about = await self._image_facts(machine, here["disk_free"])
        return {
            "systems": machine.systems,
            "emulation": Emulation.NONE if kvm else Emulation.FULL,
            "running": path is not None and has_template(machine, digest, Path(path), templates),
            "started": self._machines.find(machine.name) is not None,
            "stateful": not machine.volatile,
            "memory_mib": machine.memory_size,
            **about,
            **({} if path else {"fault": f"{binary} is not installed", "remedy": "offload doctor"}),
        }

    async def _load(self, machine: Childhurd) -> float | None:
        """Its own, while it runs; this host's says nothing of it, as its threshold is the Hurd's."""
        running = self._machines.find(machine.name)
        if running is None or not machine.offloading:
            return None
        answer = await self.probes.ask_guest(running)
        return None if isinstance(answer, OffloadError) else answer.load

    def _has_kvm(self, qemu: str) -> bool:
        return known_accelerator(Path(qemu).resolve(), self._workshop.paths.accelerator) == "kvm"

    async def _image_facts(self, machine: VmMachine, disk_free: int) -> tuple[str, dict[str, Any]]:
        """The image's digest; its kernel's version when it is built, and what its disk takes of the `disk_free` bytes here.

        And whether builds go there: into our own guests, and into a childhurd whose file does not say otherwise.
        """
        shop, name, foreign = self._workshop, machine.image, {"kernel": "", "takes_builds": _takes_builds(machine)}
        try:
            library = shop.library()
            recipe = library.image(name)
            if isinstance(recipe, FileImage):
                recipe.check_set_up()
            digest = await shop.images.digest(recipe, library.folders[name])
            image = shop.images.find(digest)
        except NotFoundError as exc:
            return "", {**foreign, "fault": exc.what, "remedy": exc.hint}
        except OffloadError:  # damaged, or without its recipe: whoever boots it is told
            return "", {"kernel": ""}
        if isinstance(recipe, FileImage):
            return digest, foreign
        return digest, {"kernel": image.kernel_version if image else "", "disk_free": min(disk_free, recipe.size)}

    async def _ssh_facts(self, machine: SshMachine) -> dict[str, Any]:
        database, now = self._workshop.database, time.time()
        facts: dict[str, Any] = {"systems": machine.systems, "running": True}
        offline = database.machine_mode(machine.name) is MachineMode.OFFLINE
        if offline or database.breaker(machine.name).state(now) == "open":
            return facts
        answer = await self.probes.ask(machine)
        if isinstance(answer, OffloadError):
            return facts | {"fault": answer.what}
        native = systems_of(answer.machine)
        emulated = bool(native) and not set(native) & set(machine.systems)
        return facts | {
            "emulation": Emulation.USER if emulated else Emulation.NONE,
            "fault": answer.fault,
            "load": answer.load,
            "memory_mib": answer.memory_mib,
            "disk_free": answer.disk_free,
            "kernel": answer.kernel,
        }


def _takes_builds(machine: VmMachine) -> bool:
    """Whether we can build in a guest of it that somebody else has made."""
    return isinstance(machine, Childhurd) and machine.offloading


def _local_facts(machine: LocalMachine) -> dict[str, Any]:
    native = native_systems()
    foreign = {system: f"this host's processor ({os.uname().machine}) does not run it" for system in machine.systems}
    return {
        "systems": machine.systems or native,
        "missing": {system: why for system, why in foreign.items() if system not in native},
        "fault": _sandbox_fault(),
    }


def _binfmt_facts(machine: BinfmtMachine) -> dict[str, Any]:
    native = native_systems()
    systems = machine.systems or tuple(name for name, system in SYSTEMS.items() if system.user and name not in native)
    try:
        missing = find_usable(read_status(), native).missing
    except HostError as exc:
        return {"systems": systems, "emulation": Emulation.USER, "fault": str(exc)}
    reasons = {system: missing.get(system, "this host runs it by itself" if system in native else "") for system in systems}
    return {
        "systems": systems,
        "emulation": Emulation.USER,
        "missing": {system: why for system, why in reasons.items() if why},
        "fault": _sandbox_fault(),
    }


def _sandbox_fault() -> str:
    return "" if os.access(BWRAP, os.X_OK) else "bubblewrap is not installed: apt-get install bubblewrap"
