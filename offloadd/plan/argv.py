"""The command line of QEMU for a plan.

Checked against QEMU 7.2 (`qemu-system-x86_64(1)`); every option is old enough for 6.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offloadd.plan.machine import VmPlan
from offloadd.plan.target import Target, find_target


@dataclass(frozen=True)
class InstanceFiles:
    """Every file of a running instance, named here once."""

    directory: Path

    @property
    def record(self) -> Path:
        return self.directory / "instance.json"

    @property
    def disk(self) -> Path:
        """What the guest writes; gone with the instance."""
        return self.directory / "disk.qcow2"

    @property
    def qmp(self) -> Path:
        return self.directory / "qmp.sock"

    @property
    def console(self) -> Path:
        return self.directory / "console.sock"

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def qemu_log(self) -> Path:
        """QEMU's own standard error."""
        return self.directory / "qemu.log"


def _escape(value: object) -> str:
    """QEMU's option syntax has a comma doubled."""
    return str(value).replace(",", ",,")


@dataclass(frozen=True, kw_only=True)
class QemuFds:
    """The descriptors that QEMU is started with: it opens nothing else of ours."""

    qmp: int
    """A socket that listens, as `console`."""
    console: int
    console_log: int
    disk: int
    base: int
    """The image's root file system, below `disk`."""
    kernel: int
    initramfs: int

    def all(self) -> list[int]:
        return [self.qmp, self.console, self.console_log, self.disk, self.base, self.kernel, self.initramfs]


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def qemu_argv(plan: VmPlan, fds: QemuFds) -> list[str]:
    """The whole command line.  The VM starts paused (-S): the supervisor pins its threads and then lets it go.

    Raises:
        NoMachineError: there is no machine type for the plan's system.
    """
    target = find_target(plan.system)
    return [
        plan.qemu.binary,
        *("-name", f"guest={_escape(plan.instance)},debug-threads=on"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-S"),
        # A guest that breaks out of the device model finds no fork, no exec, no setuid and no scheduling calls.
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        # tcg takes a thread for each processor by itself wherever the host's memory order is as strong as the guest's.
        *("-machine", target.machine, "-accel", plan.qemu.accelerator),
        *("-cpu", plan.cpu, "-smp", str(plan.cpu_count), "-m", f"{plan.memory_mib}M"),
        # clock=vm: the clock starts when the guest does, and does not follow what NTP does to the host.
        *("-rtc", f"base={plan.date:%Y-%m-%dT%H:%M:%S},clock=vm"),
        *_boot(target, fds),
        *_channels(fds),
        *_disks(target, fds),
        *_network(target, plan),
        *("-object", "rng-random,id=rng0,filename=/dev/urandom", *target.device("rng", "rng=rng0")),
        *(word for device in target.devices for word in ("-device", device)),
        *plan.options,
    ]


def _boot(target: Target, fds: QemuFds) -> list[str]:
    # panic=-1 makes a panic a reset, which -no-reboot turns into the end of QEMU.  What follows saves a third of the boot under
    # TCG: no mitigations (nobody else is in this guest), no self-tests.
    append = (
        f"root=/dev/vda console={target.console} panic=-1 quiet random.trust_cpu=on"
        f" mitigations=off cryptomgr.notests {target.kernel}"
    )
    return ["-kernel", _path(fds.kernel), "-initrd", _path(fds.initramfs), "-append", append.rstrip()]


def _channels(fds: QemuFds) -> list[str]:
    console_log = f"logfile={_path(fds.console_log)},logappend=on"
    return [
        *("-chardev", f"socket,id=qmp,fd={fds.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={fds.console},server=on,wait=off,{console_log}"),
        *("-serial", "chardev:console"),
    ]


def _disks(target: Target, fds: QemuFds) -> list[str]:
    # The overlay is thrown away: there is nothing that flushes could save.
    disk = f"driver=qcow2,node-name=root,cache.no-flush=on,file.driver=file,file.filename={_path(fds.disk)}"
    disk += f",backing.driver=raw,backing.read-only=on,backing.file.driver=file,backing.file.filename={_path(fds.base)}"
    hot = target.device("scsi", "id=hot") if target.scsi else []
    return ["-blockdev", disk, *target.device("blk", "drive=root,serial=root"), *hot]


def _network(target: Target, plan: VmPlan) -> list[str]:
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in plan.forwards)
    # Without restrict the guest reaches every service on the host's loopback.
    restrict = "" if plan.network else ",restrict=on"
    rom = ",romfile=" if target.bus == "pci" else ""
    return ["-netdev", f"user,id=net0{restrict}{forwards}", *target.device("net", f"netdev=net0{rom}")]
