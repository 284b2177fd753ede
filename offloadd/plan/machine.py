"""From a declared machine, an image and the facts of the host to a plan in which nothing is left open."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from offloadd.errors import OffloadError, UsageError
from offloadd.model.childhurd import HOST_FORWARD, SNAPSHOT, Childhurd
from offloadd.model.image import DiskFormat
from offloadd.model.machine import OLD_SSH_PORT, SECRETS_PORT, SSH_PORT, VmMachine
from offloadd.model.quantity import check_clock_holds, format_size
from offloadd.model.system import SYSTEMS
from offloadd.plan.cpu import check_cpu, choose_cpu
from offloadd.plan.target import find_target

DISKS_OF_A_BUILD = 3
"""Its environment, its source, its outputs."""
DISKS_OF_A_CLONE = DISKS_OF_A_BUILD + 1
"""Those of one build, and the environment that was mounted in it while it waited."""
MAX_BUILDS_INSIDE = 4
"""Of one machine: a PC has 32 places on its bus in all."""
HURD_CPU = "qemu64"
"""QEMU's own default, which Guix leaves a childhurd."""


@dataclass(frozen=True, kw_only=True)
class QemuFacts:
    """What one QEMU binary can do."""

    binary: str
    version: str
    cpu_models: frozenset[str]
    accelerator: str
    """`kvm` or `tcg`, as probed."""
    tsc_khz: int | None = None
    """How fast an x86 guest's time stamp counter runs, in thousands of ticks in a second; None: it has to find out itself."""


@dataclass(frozen=True, kw_only=True)
class BootFiles:
    """What an image gives to a VM."""

    image: str
    digest: str
    disk: Path
    """It is written to by a machine alone that is not volatile."""
    disk_format: DiskFormat = "raw"
    disk_size: int | None = None
    """Bytes, as the guest sees it; None: those of the file."""
    disk_file: tuple[int, int] | None = None
    """Size (bytes) and time of change (ns) of the file: an image that is made anew keeps its digest, but is another disk.  None
    where no guest is saved."""
    kernel: Path | None = None
    """None: the disk has its own boot loader, which the firmware starts."""
    initramfs: Path | None = None

    @property
    def has_agent(self) -> bool:
        """Whether ours is in there: it comes with our kernels."""
        return self.kernel is not None


@dataclass(frozen=True, kw_only=True)
class VmPlan:
    """One VM, ready to be started."""

    machine: str
    instance: str
    system: str
    qemu: QemuFacts
    boot: BootFiles
    cpu: str
    cpu_count: int
    memory_mib: int
    date: datetime
    forwards: tuple[tuple[int, int], ...]
    """(host port or 0 for any free one, guest port)."""
    network: bool
    disk_slots: int
    """Disks that can be put in while it runs."""
    boot_timeout_s: float
    options: tuple[str, ...]
    volatile: bool = True
    """Whether the guest writes to an overlay, which is thrown away; else to the disk itself."""
    net_options: tuple[str, ...] | None = None
    """QEMU's arguments for the network; None: the usual ones."""
    secret_retries: int = 60
    """How often a connection to its secret service that is refused is tried again."""
    secret_handshake_timeout_s: float | None = None
    """None: only the boot's limit."""

    @property
    def has_screen(self) -> bool:
        """Boot loaders of others write to one, and some go on only when there is one."""
        return self.boot.kernel is None


def default_qemu(machine: VmMachine) -> str:
    """The name of the QEMU binary for a machine."""
    return machine.qemu or f"qemu-system-{SYSTEMS[machine.systems[0]].qemu}"


def plan_vm(
    machine: VmMachine, qemu: QemuFacts, boot: BootFiles, *, instance: str | None = None, now: datetime | None = None
) -> VmPlan:
    """The plan of the machine itself, as its file declares it.

    Args:
        now: the date of a machine that declares none; by default the host's.
    Raises:
        NoMachineError: this QEMU does not know the CPU model, or there are no virtual machines of that type.
    """
    find_target(machine.systems[0])
    plan = VmPlan(
        machine=machine.name,
        instance=instance or machine.name,
        system=machine.systems[0],
        qemu=qemu,
        boot=boot,
        cpu=machine.cpu or "",
        cpu_count=machine.cpu_count,
        memory_mib=machine.memory_size,
        date=machine.date or (now or datetime.now(UTC)).replace(microsecond=0),
        forwards=_forwards(machine, boot),
        network=machine.network,
        disk_slots=_disk_slots(machine) if boot.has_agent else 0,
        boot_timeout_s=machine.boot_timeout,
        options=machine.options,
        volatile=machine.volatile,
    )
    if isinstance(machine, Childhurd):
        plan = replace(
            plan,
            boot=_sized(machine, boot),
            options=tuple(word for word in machine.options if word not in SNAPSHOT),
            net_options=machine.net_options,
            cpu=plan.cpu or HURD_CPU,
            secret_retries=machine.secret_retries,
            secret_handshake_timeout_s=machine.secret_handshake_timeout,
        )
    return replace(plan, cpu=_cpu(plan, plan.cpu or None, qemu.cpu_models))


def _sized(machine: Childhurd, boot: BootFiles) -> BootFiles:
    """The image's disk, as large as the machine's file says."""
    if machine.disk_size == "guess":
        return boot
    if boot.disk_size is not None and machine.disk_size < boot.disk_size:
        sizes = f"{format_size(machine.disk_size)} is less than its image has, {format_size(boot.disk_size)}"
        raise UsageError(f"disk-size: {sizes}", subject=machine.name)
    return replace(boot, disk_size=machine.disk_size)


def _forwards(machine: VmMachine, boot: BootFiles) -> tuple[tuple[int, int], ...]:
    if boot.has_agent or SECRETS_PORT in {guest for _, guest in machine.forwards}:
        return machine.forwards
    return (*machine.forwards, (0, SECRETS_PORT))


def _disk_slots(machine: VmMachine) -> int:
    """At least as many as in a clone, so that one template serves the machine and the builds in clones of it."""
    return DISKS_OF_A_CLONE + DISKS_OF_A_BUILD * (min(machine.parallel_builds, MAX_BUILDS_INSIDE) - 1)


def plan_for_build(
    plan: VmPlan, instance: str, *, date: datetime | None, cpu: str | None, pinned_cpu: bool, system: str | None = None
) -> VmPlan:
    """The plan of a VM of that machine for one build: own name, no ports, the build's date and CPU.

    Args:
        pinned_cpu: the machine's file sets `cpu`, so that another date does not change it.
        system: what is built, when it is not the machine's own type: a 32-bit one has a shorter clock than its kernel.
    Raises:
        UsageError: the machine's clock does not hold the date, or the clock of what is built.
        NoMachineError: this QEMU does not know the CPU model.
    """
    moved = replace(plan, instance=instance, date=date or plan.date)
    if plan.boot.has_agent:
        moved = replace(moved, forwards=(), disk_slots=DISKS_OF_A_CLONE)
    else:
        moved = replace(moved, forwards=_free(plan.forwards), net_options=_freed(plan.net_options))
    try:
        for kind in (plan.system, system or plan.system):
            check_clock_holds(moved.date, kind)
    except ValueError as exc:
        raise UsageError(str(exc), subject=plan.machine) from exc
    # What is built in a guest that others have made depends on its date alone: its CPU is the machine's.
    wanted = cpu or (plan.cpu if pinned_cpu or not plan.boot.has_agent else None)
    return replace(moved, cpu=_cpu(moved, wanted, plan.qemu.cpu_models))


def _free(forwards: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same guest ports on whatever ports of the host are free: the machine itself may run."""
    return tuple((0, guest) for _, guest in forwards if guest in (SECRETS_PORT, SSH_PORT, OLD_SSH_PORT))


def _freed(options: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if options is None else tuple(HOST_FORWARD.sub(r"\g<1>0-:\3", word) for word in options)


def _cpu(plan: VmPlan, wanted: str | None, known: Collection[str]) -> str:
    try:
        if wanted is None:
            return choose_cpu(plan.date, plan.system, known)
        check_cpu(wanted, known, plan.qemu.binary)
    except OffloadError as exc:
        exc.subject = exc.subject or plan.machine
        raise
    return wanted
