"""What must be the same in the guest that was saved and in its clones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offloadd.digest import json_digest
from offloadd.model.machine import VmMachine
from offloadd.plan.machine import BootFiles, VmPlan
from offloadd.plan.target import find_target

FORMAT = 6
"""Raised when templates that were made before are of no use any more."""
DATE = datetime(1970, 1, 2, tzinfo=UTC)
"""That of every template: a clone's clock is set, and its boot left no file that is newer than what is built in it."""


@dataclass(frozen=True, kw_only=True)
class TemplateKey:
    """A template's digest, and what it is made of."""

    digest: str
    facts: dict[str, Any]


def template_key(plan: VmPlan) -> TemplateKey:
    """The key of the template that serves `plan`: all but its name, date and ports.

    Raises:
        OSError: QEMU's binary is gone.
    """
    binary = Path(plan.qemu.binary).stat()
    facts = {
        "format": FORMAT,
        "image": plan.boot.image,
        "image_digest": plan.boot.digest,
        "image_file": image_file(plan.boot),
        "qemu": plan.qemu.binary,
        "qemu_version": plan.qemu.version,
        # A package's security update may keep the version.
        "qemu_file": [binary.st_size, binary.st_mtime_ns],
        "accelerator": plan.qemu.accelerator,
        # Under TCG all that a guest has of it is its time stamp counter.
        "host_cpu": plan.qemu.tsc_khz if plan.qemu.accelerator == "tcg" else _host_cpu(),
        "machine_type": find_target(plan.system).machine,
        "system": plan.system,
        "cpu": plan.cpu,
        "cpu_count": plan.cpu_count,
        "memory_mib": plan.memory_mib,
        "network": plan.network,
        "disk_slots": plan.disk_slots,
        "options": list(plan.options),
    }
    return TemplateKey(digest=json_digest(facts), facts=facts)


def image_file(boot: BootFiles) -> list[int] | None:
    """Which disk a guest was saved on: to go on with another one below, be it of the same recipe, would ruin its files."""
    return None if boot.disk_file is None else list(boot.disk_file)


def machine_facts(machine: VmMachine, image_digest: str, qemu: Path) -> dict[str, Any]:
    """What every template that serves `machine` is made of.

    The rest is not the machine's own: date and CPU are the build's, the accelerator is found when something is booted, and the
    disk's file is the image's.

    Args:
        qemu: its binary, or a link to it.
    Raises:
        OSError: there is none.
        NoMachineError: there are no virtual machines of that type.
    """
    qemu = qemu.resolve()
    binary = qemu.stat()
    return {
        "format": FORMAT,
        "image": machine.image,
        "image_digest": image_digest,
        "qemu": str(qemu),
        "qemu_file": [binary.st_size, binary.st_mtime_ns],
        "machine_type": find_target(machine.systems[0]).machine,
        "system": machine.systems[0],
        "cpu_count": machine.cpu_count,
        "memory_mib": machine.memory_size,
        "network": machine.network,
        "options": list(machine.options),
    }


def plan_template(plan: VmPlan, instance: str) -> VmPlan:
    """The plan of the guest that is saved."""
    return replace(plan, instance=instance, date=DATE, forwards=())


def _host_cpu() -> str:
    """What a guest sees of this host's processor under KVM: another host, or other microcode, may have other features."""
    words = ("model name", "flags", "Features", "CPU part")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return json_digest(sorted({line for line in lines if line.startswith(words)}))[:12]
