"""Plans and machines for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offloadd.model.machine import BuildVm, EmulatedVm
from offloadd.plan.machine import BootFiles, QemuFacts, VmPlan, plan_vm

X86_MODELS = frozenset(
    {
        "486", "qemu64", "max", "Opteron_G1", "core2duo", "Nehalem", "Westmere", "SandyBridge", "IvyBridge", "Haswell",
        "Broadwell", "Skylake-Client", "Skylake-Server", "Cascadelake-Server", "Cooperlake", "Icelake-Server", "SapphireRapids",
    }
)  # fmt: skip
"""Of QEMU 7.2, those that matter and SapphireRapids of a later one."""

BOOT = BootFiles(
    image="debian", digest="abc", kernel=Path("/i/vmlinuz"), initramfs=Path("/i/initramfs.img"), disk=Path("/i/root.ext4")
)


def facts(**changes: Any) -> QemuFacts:
    return QemuFacts(
        **{
            "binary": "/usr/bin/qemu-system-x86_64",
            "version": "7.2.22",
            "cpu_models": X86_MODELS,
            "accelerator": "tcg",
            **changes,
        }
    )


def machine(name: str = "m", **fields: Any) -> BuildVm:
    return BuildVm.model_validate({"kind": "build-vm", "name": name, "image": "debian", **fields})


def plan(name: str = "m", *, qemu: QemuFacts | None = None, **fields: Any) -> VmPlan:
    return plan_vm(machine(name, **fields), qemu or facts(), BOOT)


def emulated_plan(system: str, model: str, **fields: Any) -> VmPlan:
    """The plan of an emulated machine, whose QEMU knows one CPU model."""
    declared = {"kind": "emulated-vm", "name": "m", "image": "debian", "systems": [system], "date": "2020-01-01", **fields}
    return plan_vm(EmulatedVm.model_validate(declared), facts(cpu_models=frozenset({model})), BOOT)


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
