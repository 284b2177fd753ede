"""What a machine of each architecture looks like in QEMU.

Sources: QEMU's manual ("System Emulator Targets") for machines, their consoles and clocks, and its hw/ where that is silent:
`-rtc` reaches the guest through the MC146818 (pc), the PL031 (Arm), the Goldfish RTC (RISC-V), RTAS (pseries), and, under
TCG, the TOD clock (s390x; hw/s390x/tod-tcg.c).  Linux' admin-guide/devices.txt has the consoles' names.  Each of these has
booted Debian's own kernel; a target that has not is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offloadd.errors import NoMachineError
from offloadd.model.system import SYSTEMS


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of QEMU's full-system targets, as offload uses it."""

    machine: str
    """QEMU's machine type with its properties."""
    console: str
    """The kernel's name of the first serial port."""
    machine_of_others: str = ""
    """The type for disks with a boot loader of their own: the one that they were tried with; empty: the same."""
    bus: Literal["pci", "ccw"] = "pci"
    """Where virtio devices are."""
    disk: str = ""
    """The device that the root disk is; empty: virtio's."""
    nic: str = ""
    """The network card; empty: virtio's.  A guest with one of its own has no virtio device at all."""
    power_button: bool = True
    """Whether QEMU's `system_powerdown` reaches the guest."""
    panics_unseen: bool = False
    """Whether only its console shows that its kernel has panicked."""
    devices: tuple[str, ...] = ()
    kernel: tuple[str, ...] = ()
    """Further words for the kernel."""
    kernel_smp: tuple[str, ...] = ()
    """And for one that boots on one processor of several."""

    def device(self, kind: str, properties: str) -> list[str]:
        """The arguments for a virtio device of that kind, `blk` or `net`."""
        return ["-device", f"virtio-{kind}-{self.bus},{properties}"]


TARGETS: dict[str, Target] = {
    # pc's ACPI tables (QEMU 7.2) have the kernel interpret a loop over 128 entries for each PCI device that it turns on: 0.12 s
    # under TCG.  q35's have them written out; with our ten devices a boot is a second shorter.  Disks of others get pc, QEMU's
    # default, as systems keep what they have seen: a network card can be called by its place on the bus.
    # No calibrations of hardware that is not there.
    "x86_64": Target(
        machine="q35",
        console="ttyS0",
        machine_of_others="pc",
        devices=("pvpanic-pci",),
        kernel=("tsc=reliable", "no_timer_check", "8250.nr_uarts=1"),
        # Else it patches itself for one processor, and once more for the second.
        kernel_smp=("noreplace-smp",),
    ),
    # Without firmware there is no ACPI, and Debian's cloud kernel has no driver for the button of the device tree.
    # The default interrupt controller holds 8 processors.
    "aarch64": Target(machine="virt,gic-version=max", console="ttyAMA0", power_button=False),
    "arm": Target(machine="virt,gic-version=max", console="ttyAMA0"),
    # x-vof replaces a firmware that takes 6 s to do nothing for us; the capabilities are those that TCG does not have.
    "ppc64": Target(
        machine="pseries,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
        console="hvc0",
    ),
    "riscv64": Target(machine="virt", console="ttyS0", power_button=False),
    "s390x": Target(machine="s390-ccw-virtio", console="ttysclp0", bus="ccw"),
}
"""By QEMU's name of the target, as in `System.qemu`."""

HURD = {
    # Those of Guix's childhurds: `--hda`, which is the first disk of the first IDE bus, and an rtl8139.  GNU Mach has no ACPI
    # power button.
    system: Target(
        machine=machine,
        console="com0",
        disk="ide-hd,bus=ide.0,unit=0",
        nic="rtl8139",
        power_button=False,
        panics_unseen=True,
    )
    for system, machine in {"i586-gnu": "pc", "x86_64-gnu": "q35"}.items()
}
"""By system type."""


def find_target(system: str) -> Target:
    """The machine for guests of type `system`.

    Raises:
        NoMachineError: there is none.
    """
    found = HURD.get(system) or TARGETS.get(SYSTEMS[system].qemu)
    if found is None:
        known = ", ".join(name for name, other in SYSTEMS.items() if name in HURD or other.qemu in TARGETS)
        raise NoMachineError(f"offload has no virtual machine for {system}", hint=f"it has for {known}")
    return found
