"""CPU models by date, plans, command lines."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from offloadd.errors import NoMachineError, UsageError
from offloadd.plan.argv import MemoryFds, QemuFds, empty_slot, qemu_argv, slot_is_writable, slot_name
from offloadd.plan.cpu import MODELS, check_cpu, choose_cpu
from offloadd.plan.machine import DISKS_OF_A_CLONE, BootFiles, default_qemu, plan_for_build, plan_vm
from offloadd.plan.target import TARGETS

from .plans import BOOT, X86_MODELS, day, emulated_plan, facts, machine, plan


@pytest.mark.parametrize(
    ("date", "model"),
    [
        ("1970-01-01", "Opteron_G1"),
        ("2005-12-31", "Opteron_G1"),
        ("2006-07-27", "Opteron_G1"),  # released before the date, not on it
        ("2006-07-28", "core2duo"),
        ("2008-12-31", "Nehalem"),
        ("2010-12-31", "Westmere"),
        ("2011-12-31", "SandyBridge"),
        ("2012-12-31", "IvyBridge"),
        ("2013-12-31", "Haswell"),
        ("2014-12-31", "Broadwell"),
        ("2015-12-31", "Skylake-Client"),
        ("2018-01-01", "Skylake-Server"),
        ("2020-01-01", "Cascadelake-Server"),
        ("2023-06-01", "SapphireRapids"),
        ("2069-01-01", "SapphireRapids"),
    ],
)
def test_the_newest_model_released_before_a_date(date: str, model: str) -> None:
    assert choose_cpu(day(date), "x86_64-linux", X86_MODELS) == model
    assert choose_cpu(day(date), "i686-linux", X86_MODELS) == model


def test_a_model_that_this_qemu_does_not_know_is_passed_over() -> None:
    assert (
        choose_cpu(day("2020-01-01"), "x86_64-linux", X86_MODELS - {"Cascadelake-Server", "Skylake-Server"}) == "Skylake-Client"
    )
    assert choose_cpu(day("2004-01-01"), "x86_64-linux", X86_MODELS - {"Opteron_G1"}) == "core2duo"
    with pytest.raises(NoMachineError, match="knows no CPU model"):
        choose_cpu(day("2020-01-01"), "x86_64-linux", {"486"})


@pytest.mark.parametrize("target", MODELS)
def test_each_table_is_in_order_and_without_doubles(target: str) -> None:
    days = [day for day, _ in MODELS[target]]
    names = [name for _, name in MODELS[target]]
    assert days == sorted(set(days))
    assert len(set(names)) == len(names)


def test_each_target_has_a_table() -> None:
    assert set(MODELS) == set(TARGETS)


def test_a_system_without_a_target() -> None:
    with pytest.raises(NoMachineError, match="this QEMU knows no CPU model of mips64el-linux"):
        choose_cpu(day("2020-01-01"), "mips64el-linux", {"max"})
    with pytest.raises(NoMachineError) as caught:
        emulated_plan("mips64el-linux", "max")
    assert caught.value.what == "offload has no virtual machine for mips64el-linux"
    assert "aarch64-linux" in caught.value.hint
    assert "i586-gnu" in caught.value.hint


def test_an_unknown_model_is_refused_with_the_nearest_names() -> None:
    check_cpu("Haswell,-avx2", X86_MODELS, "qemu")
    with pytest.raises(NoMachineError) as caught:
        check_cpu("Nehalm", X86_MODELS, "qemu-system-x86_64")
    assert caught.value.render() == "qemu-system-x86_64 does not know the CPU model 'Nehalm'\n  hint: did you mean Nehalem?"
    with pytest.raises(NoMachineError, match="''"):
        check_cpu("", X86_MODELS, "qemu")


def test_the_plan_of_a_machine() -> None:
    made = plan("vm", date="2012-01-01", memory_size=512, cpu_count=2)
    assert (made.machine, made.instance, made.system) == ("vm", "vm", "x86_64-linux")
    assert (made.cpu, made.cpu_count, made.memory_mib) == ("SandyBridge", 2, 512)
    assert made.forwards == ((11022, 22),)
    assert (made.disk_slots, made.boot.digest) == (4, "abc")
    assert plan(cpu="486").cpu == "486"
    with pytest.raises(NoMachineError) as caught:
        plan("vm", cpu="Pentium9")
    assert caught.value.subject == "vm"
    assert default_qemu(machine()) == "qemu-system-x86_64"
    assert default_qemu(machine(qemu="/opt/qemu")) == "/opt/qemu"


def test_the_plan_of_a_build_has_its_own_name_date_and_cpu_and_no_ports() -> None:
    moved = plan_for_build(plan(parallel_builds=3), "build-1", date=day("2009-01-01"), cpu=None, pinned_cpu=False)
    assert (moved.instance, moved.machine, moved.cpu, moved.date) == ("build-1", "m", "Nehalem", day("2009-01-01"))
    assert (moved.forwards, moved.disk_slots) == ((), DISKS_OF_A_CLONE)


@pytest.mark.parametrize(("builds", "slots"), [(1, 4), (2, 7), (4, 13), (5, 13), (64, 13)])
def test_each_build_in_a_machine_has_its_drives_as_far_as_a_bus_goes(builds: int, slots: int) -> None:
    assert plan(parallel_builds=builds).disk_slots == slots


def test_a_machine_without_a_date_has_todays() -> None:
    now = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    declared = machine("vm", date=None)
    made = plan_vm(declared, facts(), BOOT, now=now)
    assert made.date == now.replace(microsecond=0)
    assert made.cpu == "SapphireRapids"
    assert abs(plan_vm(declared, facts(), BOOT).date - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_cpu_that_the_machine_pins_stays_at_another_date() -> None:
    pinned = plan(cpu="486")
    assert plan_for_build(pinned, "b", date=day("2009-01-01"), cpu=None, pinned_cpu=True).cpu == "486"
    assert plan_for_build(pinned, "b", date=None, cpu="Haswell", pinned_cpu=True).cpu == "Haswell"
    with pytest.raises(NoMachineError):
        plan_for_build(pinned, "b", date=None, cpu="Hazwell", pinned_cpu=True)


def test_a_date_that_the_clock_does_not_hold() -> None:
    with pytest.raises(UsageError, match="2150-01-01 is outside"):
        plan_for_build(plan(), "b", date=day("2150-01-01"), cpu=None, pinned_cpu=False)


def test_what_is_built_has_a_clock_of_its_own() -> None:
    arm = emulated_plan("aarch64-linux", "neoverse-n1")
    late = day("2050-01-01")
    assert plan_for_build(arm, "b", date=late, cpu=None, pinned_cpu=False).date == late
    with pytest.raises(UsageError, match="outside what the clock of armhf-linux holds"):
        plan_for_build(arm, "b", date=late, cpu=None, pinned_cpu=False, system="armhf-linux")
    # The machine's own date counts when the build has none.
    arm = replace(arm, date=late)
    with pytest.raises(UsageError, match="armhf-linux"):
        plan_for_build(arm, "b", date=None, cpu=None, pinned_cpu=False, system="armhf-linux")


FDS = QemuFds(qmp=7, console=8, agent=14, console_log=9, disk=10, base=11, kernel=12, initramfs=13)
SAVING = replace(FDS, memory=MemoryFds(ram=15))
CLONE = replace(FDS, memory=MemoryFds(ram=15, frozen=16))
SLOTS = [
    *("-blockdev", "driver=null-co,node-name=empty0,size=1099511627776,read-zeroes=on,read-only=on"),
    *("-device", "virtio-blk-pci,id=slot0,drive=empty0,serial=slot0"),
    *("-blockdev", "driver=null-co,node-name=empty1,size=1099511627776,read-zeroes=on,read-only=on"),
    *("-device", "virtio-blk-pci,id=slot1,drive=empty1,serial=slot1"),
    *("-blockdev", "driver=null-co,node-name=empty2,size=1099511627776,read-zeroes=on,read-only=off"),
    *("-device", "virtio-blk-pci,id=slot2,drive=empty2,serial=slot2,werror=report"),
    *("-blockdev", "driver=null-co,node-name=empty3,size=1099511627776,read-zeroes=on,read-only=on"),
    *("-device", "virtio-blk-pci,id=slot3,drive=empty3,serial=slot3"),
]


def options(argv: list[str], name: str) -> list[str]:
    """The values of each use of an option."""
    return [argv[index + 1] for index, word in enumerate(argv) if word == name]


def test_the_whole_command_line() -> None:
    argv = qemu_argv(plan(), FDS)
    assert argv == [
        "/usr/bin/qemu-system-x86_64",
        *("-name", "guest=m,debug-threads=on"),
        *("-no-user-config", "-nodefaults", "-no-reboot", "-S"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-machine", "q35", "-m", "2048M"),
        *("-accel", "tcg", "-cpu", "Cascadelake-Server", "-smp", "4"),
        *("-rtc", "base=2020-01-01T00:00:00,clock=vm"),
        *("-kernel", "/proc/self/fd/12", "-initrd", "/proc/self/fd/13"),
        *("-append", options(argv, "-append")[0]),
        *("-display", "none"),
        *("-chardev", "socket,id=qmp,fd=7,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        "-chardev",
        "socket,id=console,fd=8,server=on,wait=off,logfile=/proc/self/fd/9,logappend=on",
        *("-serial", "chardev:console"),
        *("-chardev", "socket,id=agent,fd=14,server=on,wait=off"),
        *("-device", "virtio-serial-pci,max_ports=2,vectors=7"),
        *("-device", "virtserialport,chardev=agent,name=org.offload.agent"),
        "-blockdev",
        "driver=qcow2,node-name=root,cache.no-flush=on,file.driver=file,file.filename=/proc/self/fd/10"
        ",backing.driver=raw,backing.read-only=on,backing.file.driver=file,backing.file.filename=/proc/self/fd/11",
        *("-device", "virtio-blk-pci,drive=root,serial=root"),
        *SLOTS,
        *("-netdev", "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:11022-:22"),
        *("-device", "virtio-net-pci,netdev=net0,guest_announce=off,romfile="),
        *("-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0"),
        *("-device", "pvpanic-pci"),
    ]


@pytest.mark.parametrize(
    ("system", "model", "virtual_machine", "console", "bus"),
    [
        ("aarch64-linux", "cortex-a72", "virt,gic-version=max", "ttyAMA0", "pci"),
        ("armhf-linux", "cortex-a15", "virt,gic-version=max", "ttyAMA0", "pci"),
        (
            "powerpc64le-linux",
            "power9",
            "pseries,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
            "hvc0",
            "pci",
        ),
        ("riscv64-linux", "rv64", "virt", "ttyS0", "pci"),
        ("s390x-linux", "max", "s390-ccw-virtio", "ttysclp0", "ccw"),
    ],
)
def test_the_command_line_of_other_targets(system: str, model: str, virtual_machine: str, console: str, bus: str) -> None:
    argv = qemu_argv(emulated_plan(system, model), FDS)
    assert options(argv, "-machine") == [virtual_machine]
    assert options(argv, "-accel") == ["tcg"]
    assert options(argv, "-cpu") == [model]
    assert options(argv, "-rtc") == ["base=2020-01-01T00:00:00,clock=vm"]
    assert options(argv, "-append") == [
        f"root=/dev/vda console={console} panic=-1 quiet random.trust_cpu=on mitigations=off norandmaps cryptomgr.notests"
        " lsm=landlock,lockdown,yama psi=0 maxcpus=1"
    ]
    assert options(argv, "-device") == [
        f"virtio-serial-{bus},max_ports=2" + (",vectors=7" if bus == "pci" else ""),
        "virtserialport,chardev=agent,name=org.offload.agent",
        f"virtio-blk-{bus},drive=root,serial=root",
        *(f"virtio-blk-{bus},id=slot{number},drive=empty{number},serial=slot{number}" for number in range(2)),
        f"virtio-blk-{bus},id=slot2,drive=empty2,serial=slot2,werror=report",
        f"virtio-blk-{bus},id=slot3,drive=empty3,serial=slot3",
        f"virtio-net-{bus},netdev=net0,guest_announce=off" + (",romfile=" if bus == "pci" else ""),
        f"virtio-rng-{bus},rng=rng0",
    ]
    assert options(argv, "-sandbox") == options(qemu_argv(plan(), FDS), "-sandbox")


def test_what_the_kernel_must_be_told() -> None:
    words = options(qemu_argv(plan(), FDS), "-append")[0].split()
    assert {"root=/dev/vda", "console=ttyS0", "panic=-1"} <= set(words)


def test_a_guest_is_told_how_fast_its_processor_is() -> None:
    assert " tsc_early_khz=2600000" in options(qemu_argv(plan(qemu=facts(tsc_khz=2600000)), FDS), "-append")[0]
    assert "tsc_early_khz" not in options(qemu_argv(plan(), FDS), "-append")[0]


@pytest.mark.parametrize(
    ("accelerator", "processors", "told"), [("tcg", 4, True), ("tcg", 2, True), ("tcg", 1, False), ("kvm", 4, False)]
)
def test_an_emulated_kernel_boots_on_one_processor(accelerator: str, processors: int, told: bool) -> None:
    argv = qemu_argv(plan(cpu_count=processors, qemu=facts(accelerator=accelerator)), FDS)
    words = set(options(argv, "-append")[0].split())
    assert words & {"maxcpus=1", "noreplace-smp"} == ({"maxcpus=1", "noreplace-smp"} if told else set())
    assert options(argv, "-smp") == [str(processors)]


def test_what_changes_an_option() -> None:
    argv = qemu_argv(plan(network=True, options=["-snapshot"], date="1999-12-31T23:59:58Z", qemu=facts(accelerator="kvm")), FDS)
    assert options(argv, "-accel") == ["kvm"]
    assert options(argv, "-rtc") == ["base=1999-12-31T23:59:58,clock=vm"]
    assert "restrict" not in options(argv, "-netdev")[0]
    assert argv[-1] == "-snapshot"


def test_ports_are_forwarded_on_loopback_only() -> None:
    forwards = {12022: 22, 12080: 80}
    [netdev] = options(qemu_argv(plan(port_forwardings=forwards), FDS), "-netdev")
    assert netdev.endswith(",hostfwd=tcp:127.0.0.1:12022-:22,hostfwd=tcp:127.0.0.1:12080-:80")
    assert netdev.count("hostfwd=") == netdev.count("hostfwd=tcp:127.0.0.1:") == 2


def test_nobody_reaches_the_vm_of_a_build() -> None:
    moved = plan_for_build(plan(), "b", date=None, cpu=None, pinned_cpu=False)
    assert options(qemu_argv(moved, FDS), "-netdev") == ["user,id=net0,restrict=on"]


@pytest.mark.parametrize("fds", [FDS, SAVING, CLONE])
def test_nothing_of_ours_is_named_by_its_path(fds: QemuFds) -> None:
    argv = qemu_argv(plan(), fds)
    assert not [word for word in argv[1:] if "/i/" in word or "/run/" in word]
    named = {int(number) for number in re.findall(r"(?:/proc/self/fd/|,fd=)(\d+)", " ".join(argv))}
    assert named == set(fds.all())


def test_the_memory_of_a_guest_that_will_be_saved() -> None:
    argv = qemu_argv(plan(), SAVING)
    assert options(argv, "-object")[0] == "memory-backend-file,id=ram,size=2048M,mem-path=/proc/self/fd/15,share=on"
    assert (options(argv, "-machine"), options(argv, "-m")) == (["q35,memory-backend=ram"], ["2048M"])
    assert "-incoming" not in argv
    assert options(argv, "-blockdev") == options(qemu_argv(plan(), FDS), "-blockdev")


def test_the_memory_of_a_guest_that_goes_on() -> None:
    argv = qemu_argv(plan(), CLONE)
    assert options(argv, "-object")[0] == "memory-backend-file,id=ram,size=2048M,mem-path=/proc/self/fd/15,share=off"
    assert (options(argv, "-machine"), options(argv, "-incoming")) == (["q35,memory-backend=ram"], ["defer"])
    assert options(argv, "-blockdev")[0] == (
        "driver=qcow2,node-name=root,cache.no-flush=on,file.driver=file,file.filename=/proc/self/fd/10"
        ",backing.driver=qcow2,backing.read-only=on,backing.file.driver=file,backing.file.filename=/proc/self/fd/16"
        ",backing.backing.driver=raw,backing.backing.read-only=on"
        ",backing.backing.file.driver=file,backing.backing.file.filename=/proc/self/fd/11"
    )


@pytest.mark.parametrize(
    ("system", "model"), [("x86_64-linux", "Cascadelake-Server"), ("s390x-linux", "max"), ("powerpc64le-linux", "power9")]
)
def test_a_clone_has_the_devices_of_what_was_saved(system: str, model: str) -> None:
    """QEMU matches them by kind, order and name."""
    wanted = plan() if system == "x86_64-linux" else emulated_plan(system, model)
    saved, clone = qemu_argv(wanted, SAVING), qemu_argv(replace(wanted, instance="other"), CLONE)
    for name in ("-machine", "-accel", "-cpu", "-smp", "-m", "-device", "-append"):
        assert options(saved, name) == options(clone, name)
    assert options(saved, "-machine")[0].endswith(",memory-backend=ram")


def test_drives_are_named_once_and_every_third_can_be_written_to() -> None:
    argv = qemu_argv(plan(parallel_builds=4), FDS)
    drives = [word for word in options(argv, "-device") if "slot" in word]
    empty = [word for word in options(argv, "-blockdev") if "null-co" in word]
    assert drives == [
        f"virtio-blk-pci,id={slot_name(number)},drive={empty_slot(number)},serial={slot_name(number)}"
        + (",werror=report" if slot_is_writable(number) else "")
        for number in range(13)
    ]
    assert [word.endswith("read-only=off") for word in empty] == [number % 3 == 2 for number in range(13)]
    assert [slot_is_writable(number) for number in range(6)] == [False, False, True] * 2
    # virtio-blk's serial has room for 20 bytes.
    assert len({slot_name(number) for number in range(100)}) == 100
    assert max(len(slot_name(number)) for number in range(100)) <= 20
    assert not [word for word in qemu_argv(replace(plan(), disk_slots=0), FDS) if "slot" in word or "null-co" in word]


def test_a_disk_with_a_boot_loader_of_its_own() -> None:
    boot = BootFiles(image="guix", digest="abc", disk=Path("/i/disk"), disk_format="qcow2", disk_size=1024)
    fds = QemuFds(qmp=3, console=4, console_log=6, disk=7, base=8)
    assert fds.all() == [3, 4, 6, 7, 8]
    argv = qemu_argv(plan_vm(machine(), facts(), boot), fds)
    assert not {"-kernel", "-initrd", "-append"} & set(argv)
    assert ("-vga", "std") in pairwise(argv)
    assert ("-machine", "pc") in pairwise(argv)
    assert not any("virtserialport" in word or "slot" in word for word in argv), "no agent, no drives of builds"
    assert "virtio-blk-pci,drive=root,serial=root,bootindex=0" in argv
    [disk] = [word for word in argv if "node-name=root" in word]
    assert "backing.driver=qcow2,backing.read-only=on" in disk
