"""The command line of QEMU for a plan.

Checked against QEMU 7.2 (`qemu-system-x86_64(1)`); every option is old enough for 6.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offloadd.plan.machine import VmPlan


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


def qemu_argv(plan: VmPlan, files: InstanceFiles, qmp_fd: int) -> list[str]:
    """The whole command line.  The VM starts paused (-S): the supervisor pins its threads and then lets it go.

    Args:
        qmp_fd: a socket that listens already, so that nobody has to wait for QEMU to make it.
    """
    return [
        plan.qemu.binary,
        *("-name", f"guest={_escape(plan.instance)},debug-threads=on"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-S"),
        # A guest that breaks out of the device model finds no fork, no exec, no setuid and no scheduling calls.
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        # pc starts faster than q35 and takes hot-plugged disks through ACPI without ports set aside for them.
        *("-machine", "pc", "-accel", "kvm" if plan.qemu.accelerator == "kvm" else "tcg,thread=multi"),
        *("-cpu", plan.cpu, "-smp", str(plan.cpu_count), "-m", f"{plan.memory_mib}M"),
        # clock=vm: the clock starts when the guest does, and does not follow what NTP does to the host.
        *("-rtc", f"base={plan.date:%Y-%m-%dT%H:%M:%S},clock=vm"),
        *_boot(plan),
        *_channels(files, qmp_fd),
        *_disk(files),
        *_network(plan),
        *("-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0"),
        *("-device", "pvpanic-pci"),
        *plan.options,
    ]


def _boot(plan: VmPlan) -> list[str]:
    # panic=-1 makes a panic a reset, which -no-reboot turns into the end of QEMU.  The second line saves a third of the
    # boot under TCG: no mitigations (nobody else is in this guest), no self-tests and calibrations of hardware that is not
    # there.
    append = (
        "root=/dev/vda console=ttyS0 panic=-1 quiet random.trust_cpu=on"
        " mitigations=off tsc=reliable no_timer_check cryptomgr.notests 8250.nr_uarts=1"
    )
    return ["-kernel", str(plan.boot.kernel), "-initrd", str(plan.boot.initramfs), "-append", append]


def _channels(files: InstanceFiles, qmp_fd: int) -> list[str]:
    console_log = f"logfile={_escape(files.console_log)},logappend=on"
    return [
        *("-chardev", f"socket,id=qmp,fd={qmp_fd},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,path={_escape(files.console)},server=on,wait=off,{console_log}"),
        *("-serial", "chardev:console"),
    ]


def _disk(files: InstanceFiles) -> list[str]:
    # The overlay is thrown away: there is nothing that flushes could save.
    disk = f"driver=qcow2,node-name=root,cache.no-flush=on,file.driver=file,file.filename={_escape(files.disk)}"
    return ["-blockdev", disk, "-device", "virtio-blk-pci,drive=root,serial=root"]


def _network(plan: VmPlan) -> list[str]:
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in plan.forwards)
    # Without restrict the guest reaches every service on the host's loopback.
    restrict = "" if plan.network else ",restrict=on"
    return ["-netdev", f"user,id=net0{restrict}{forwards}", "-device", "virtio-net-pci,netdev=net0,romfile="]
