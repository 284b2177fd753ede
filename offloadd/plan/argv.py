"""The command line of QEMU for a plan.

Checked against QEMU 7.2 (`qemu-system-x86_64(1)`); every option is old enough for 6.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offloadd.plan.machine import DISKS_OF_A_BUILD, VmPlan
from offloadd.plan.target import Target, find_target

SLOT_BYTES = 1 << 40
"""Larger than any disk that is put in: a guest reads no further than the file system that it finds."""
AGENT_PORT = "org.offload.agent"
"""The name of the agent's virtio-serial port in the guest."""


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
    def agent(self) -> Path:
        """The socket of the guest's agent."""
        return self.directory / "agent.sock"

    @property
    def vnc(self) -> Path:
        """Where viewers of its screen connect."""
        return self.directory / "vnc.sock"

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
class MemoryFds:
    """The memory of a guest that is to be saved, or that goes on from where another one was saved."""

    ram: int
    frozen: int | None = None
    """The disk that the saved guest wrote, between `disk` and `base`.  None: this is the guest that will be saved."""

    def all(self) -> list[int]:
        return [self.ram] if self.frozen is None else [self.ram, self.frozen]


@dataclass(frozen=True, kw_only=True)
class QemuFds:
    """The descriptors that QEMU is started with: it opens nothing else of ours."""

    qmp: int
    """A socket that listens, as `console` and `agent` are."""
    console: int
    console_log: int
    disk: int
    base: int | None
    """The image's disk, below `disk`; None where the guest writes to the image itself."""
    agent: int | None = None
    """Of a guest that has none, None; and so are the next two of one with a boot loader."""
    kernel: int | None = None
    initramfs: int | None = None
    memory: MemoryFds | None = None
    """None: the guest's memory is QEMU's own."""

    def all(self) -> list[int]:
        own = [self.qmp, self.console, self.console_log, self.disk, self.base, self.agent, self.kernel, self.initramfs]
        return [fd for fd in own if fd is not None] + (self.memory.all() if self.memory else [])


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
        *("-no-user-config", "-nodefaults", "-no-reboot", "-S"),
        # A guest that breaks out of the device model finds no fork, no exec, no setuid and no scheduling calls.
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        # tcg takes a thread for each processor by itself wherever the host's memory order is as strong as the guest's.
        *_memory(target, plan, fds.memory),
        *("-accel", plan.qemu.accelerator, "-cpu", plan.cpu, "-smp", str(plan.cpu_count)),
        # clock=vm: the clock starts when the guest does, and does not follow what NTP does to the host.
        *("-rtc", f"base={plan.date:%Y-%m-%dT%H:%M:%S},clock=vm"),
        *_boot(target, plan, fds),
        # A viewer's connection is given to QEMU: it listens for none itself.
        *(("-vga", "std", "-vnc", "none") if plan.has_screen else ("-display", "none")),
        *_channels(target, fds),
        *_disks(target, plan, fds),
        *_slots(target, plan),
        *_network(target, plan),
        *_random(target),
        *(word for device in target.devices for word in ("-device", device)),
        *plan.options,
    ]


def _boot(target: Target, plan: VmPlan, fds: QemuFds) -> list[str]:
    if fds.kernel is None or fds.initramfs is None:
        return []
    # panic=-1 makes a panic a reset, which -no-reboot turns into the end of QEMU.  What follows saves a third of the boot under
    # TCG: no mitigations (nobody else is in this guest), no self-tests; and two thirds of each start of a program: addresses
    # that stay the same (QEMU below 8.0 translates code anew for each address that it is found at).  No security module that
    # has no policy here, but looks at each path nevertheless, and no measure of pressure, which nobody reads.
    words = [
        *("root=/dev/vda", f"console={target.console}", "panic=-1", "quiet", "random.trust_cpu=on"),
        *("mitigations=off", "norandmaps", "cryptomgr.notests", "lsm=landlock,lockdown,yama", "psi=0"),
        *target.kernel,
    ]
    if plan.qemu.tsc_khz is not None:
        words.append(f"tsc_early_khz={plan.qemu.tsc_khz}")
    if plan.qemu.accelerator == "tcg" and plan.cpu_count > 1:
        # A kernel that boots patches itself, and QEMU (7.2) can go on for ever with what it translated for another processor in
        # the middle of that: both stand at a breakpoint that is gone, or one gets no timer any more (once in 350 boots of two
        # processors, three at a time).  So the kernel boots on one, and the image's init turns on the others.
        words += ["maxcpus=1", *target.kernel_smp]
    return ["-kernel", _path(fds.kernel), "-initrd", _path(fds.initramfs), "-append", " ".join(words)]


def _memory(target: Target, plan: VmPlan, fds: MemoryFds | None) -> list[str]:
    size = f"{plan.memory_mib}M"
    if fds is None:
        kind = target.machine if plan.boot.has_agent else target.machine_of_others or target.machine
        return ["-machine", kind, "-m", size]
    # The one that is saved writes into the file; what goes on from it has each page of its own that it writes to.
    share = "on" if fds.frozen is None else "off"
    backend = f"memory-backend-file,id=ram,size={size},mem-path={_path(fds.ram)},share={share}"
    incoming = [] if fds.frozen is None else ["-incoming", "defer"]
    return ["-object", backend, "-machine", f"{target.machine},memory-backend=ram", "-m", size, *incoming]


def _channels(target: Target, fds: QemuFds) -> list[str]:
    console_log = f"logfile={_path(fds.console_log)},logappend=on"
    return [
        *("-chardev", f"socket,id=qmp,fd={fds.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={fds.console},server=on,wait=off,{console_log}"),
        *("-serial", "chardev:console"),
        *_agent(target, fds.agent),
    ]


def _agent(target: Target, fd: int | None) -> list[str]:
    if fd is None:
        return []
    # An interrupt for each of its six queues and one for changes: with fewer, each byte has the guest look at all of them.
    vectors = ",vectors=7" if target.bus == "pci" else ""
    return [
        *("-chardev", f"socket,id=agent,fd={fd},server=on,wait=off"),
        *target.device("serial", f"max_ports=2{vectors}"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
    ]


def _disks(target: Target, plan: VmPlan, fds: QemuFds) -> list[str]:
    if fds.base is None:
        # It is the user's own file, which nobody else may open by its name: QEMU takes this very descriptor.
        given = ["-add-fd", f"fd={fds.disk},set=1"]
        own = f"driver={plan.boot.disk_format},node-name=root,file.driver=file,file.filename=/dev/fdset/1"
        return [*given, "-blockdev", own, *_root_device(target, fds)]
    # The overlay is thrown away: there is nothing that flushes could save.
    disk = f"driver=qcow2,node-name=root,cache.no-flush=on,file.driver=file,file.filename={_path(fds.disk)}"
    below = "backing"
    if fds.memory is not None and fds.memory.frozen is not None:
        frozen = _path(fds.memory.frozen)
        disk += f",backing.driver=qcow2,backing.read-only=on,backing.file.driver=file,backing.file.filename={frozen}"
        below = "backing.backing"
    # Told, never looked for: a guest can write whatever first bytes it likes.
    kind = plan.boot.disk_format
    disk += f",{below}.driver={kind},{below}.read-only=on,{below}.file.driver=file,{below}.file.filename={_path(fds.base)}"
    return ["-blockdev", disk, *_root_device(target, fds)]


def _root_device(target: Target, fds: QemuFds) -> list[str]:
    first = ",bootindex=0" if fds.kernel is None else ""
    if target.disk:
        return ["-device", f"{target.disk},drive=root{first}"]
    return target.device("blk", f"drive=root,serial=root{first}")


def _random(target: Target) -> list[str]:
    if target.nic:
        return []
    return ["-object", "rng-random,id=rng0,filename=/dev/urandom", *target.device("rng", "rng=rng0")]


def _slots(target: Target, plan: VmPlan) -> list[str]:
    """Drives without a disk: to put one in takes a few milliseconds, where to plug in a whole drive takes the guest 0.3 s.

    The guest believes that each holds a disk of `SLOT_BYTES`.
    """
    words: list[str] = []
    for number in range(plan.disk_slots):
        read_only = "off" if slot_is_writable(number) else "on"
        empty = f"driver=null-co,node-name={empty_slot(number)},size={SLOT_BYTES},read-zeroes=on,read-only={read_only}"
        slot = slot_name(number)
        # A host's disk that is full is the build's trouble whose outputs these are, and not the machine's.
        on_error = ",werror=report" if slot_is_writable(number) else ""
        words += ["-blockdev", empty, *target.device("blk", f"id={slot},drive={empty_slot(number)},serial={slot}{on_error}")]
    return words


def slot_name(number: int) -> str:
    """A drive's name in QEMU and its serial in the guest."""
    return f"slot{number}"


def empty_slot(number: int) -> str:
    """The name of what is in a drive that has no disk."""
    return f"empty{number}"


def slot_is_writable(number: int) -> bool:
    """The last drive of each build's is for what it gives back."""
    return number % DISKS_OF_A_BUILD == DISKS_OF_A_BUILD - 1


def _network(target: Target, plan: VmPlan) -> list[str]:
    if plan.net_options is not None:
        return list(plan.net_options)
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in plan.forwards)
    # Without restrict the guest reaches every service on the host's loopback.
    restrict = "" if plan.network else ",restrict=on"
    rom = ",romfile=" if target.bus == "pci" else ""
    # No switch has to learn where a clone is: to announce itself would be among the first things that it does.
    own = target.device("net", f"netdev=net0,guest_announce=off{rom}")
    device = ["-device", f"{target.nic},netdev=net0{rom}"] if target.nic else own
    return ["-netdev", f"user,id=net0{restrict}{forwards}", *device]
