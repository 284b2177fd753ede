"""CPU models by date, plans, command lines."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from offloadd.errors import NoMachineError, UsageError
from offloadd.plan.argv import QemuFds, qemu_argv
from offloadd.plan.cpu import MODELS, check_cpu, choose_cpu
from offloadd.plan.machine import default_qemu, plan_for_build, plan_vm
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
    assert "gnu" not in caught.value.hint


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
    assert made.forwards == ((11022, 22), (11044, 1004))
    assert plan(cpu="486").cpu == "486"
    with pytest.raises(NoMachineError) as caught:
        plan("vm", cpu="Pentium9")
    assert caught.value.subject == "vm"
    assert default_qemu(machine()) == "qemu-system-x86_64"
    assert default_qemu(machine(qemu="/opt/qemu")) == "/opt/qemu"


def test_the_plan_of_a_build_has_its_own_name_ports_date_and_cpu() -> None:
    moved = plan_for_build(plan(), "build-1", date=day("2009-01-01"), cpu=None, pinned_cpu=False)
    assert (moved.instance, moved.machine, moved.cpu, moved.date) == ("build-1", "m", "Nehalem", day("2009-01-01"))
    assert moved.forwards == ((0, 22), (0, 1004))


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


FDS = QemuFds(qmp=7, console=8, console_log=9, disk=10, base=11, kernel=12, initramfs=13)


def options(argv: list[str], name: str) -> list[str]:
    """The values of each use of an option."""
    return [argv[index + 1] for index, word in enumerate(argv) if word == name]


def test_the_whole_command_line() -> None:
    argv = qemu_argv(plan(), FDS)
    assert argv == [
        "/usr/bin/qemu-system-x86_64",
        *("-name", "guest=m,debug-threads=on"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-S"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-machine", "pc", "-accel", "tcg"),
        *("-cpu", "Cascadelake-Server", "-smp", "4", "-m", "2048M"),
        *("-rtc", "base=2020-01-01T00:00:00,clock=vm"),
        *("-kernel", "/proc/self/fd/12", "-initrd", "/proc/self/fd/13"),
        *("-append", options(argv, "-append")[0]),
        *("-chardev", "socket,id=qmp,fd=7,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        "-chardev",
        "socket,id=console,fd=8,server=on,wait=off,logfile=/proc/self/fd/9,logappend=on",
        *("-serial", "chardev:console"),
        "-blockdev",
        "driver=qcow2,node-name=root,cache.no-flush=on,file.driver=file,file.filename=/proc/self/fd/10"
        ",backing.driver=raw,backing.read-only=on,backing.file.driver=file,backing.file.filename=/proc/self/fd/11",
        *("-device", "virtio-blk-pci,drive=root,serial=root"),
        *("-netdev", "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:11022-:22,hostfwd=tcp:127.0.0.1:11044-:1004"),
        *("-device", "virtio-net-pci,netdev=net0,romfile="),
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
        f"root=/dev/vda console={console} panic=-1 quiet random.trust_cpu=on mitigations=off cryptomgr.notests"
    ]
    assert options(argv, "-device") == [
        f"virtio-blk-{bus},drive=root,serial=root",
        f"virtio-scsi-{bus},id=hot",
        "virtio-net-pci,netdev=net0,romfile=" if bus == "pci" else "virtio-net-ccw,netdev=net0",
        f"virtio-rng-{bus},rng=rng0",
    ]
    assert options(argv, "-sandbox") == options(qemu_argv(plan(), FDS), "-sandbox")


def test_what_the_kernel_must_be_told() -> None:
    words = options(qemu_argv(plan(), FDS), "-append")[0].split()
    assert {"root=/dev/vda", "console=ttyS0", "panic=-1"} <= set(words)


def test_what_changes_an_option() -> None:
    argv = qemu_argv(plan(network=True, options=["-snapshot"], date="1999-12-31T23:59:58Z", qemu=facts(accelerator="kvm")), FDS)
    assert options(argv, "-accel") == ["kvm"]
    assert options(argv, "-rtc") == ["base=1999-12-31T23:59:58,clock=vm"]
    assert "restrict" not in options(argv, "-netdev")[0]
    assert argv[-1] == "-snapshot"


def test_ports_are_forwarded_on_loopback_only() -> None:
    moved = plan_for_build(plan(), "b", date=None, cpu=None, pinned_cpu=False)
    [netdev] = options(qemu_argv(moved, FDS), "-netdev")
    assert netdev.endswith(",hostfwd=tcp:127.0.0.1:0-:22,hostfwd=tcp:127.0.0.1:0-:1004")
    assert netdev.count("hostfwd=") == netdev.count("hostfwd=tcp:127.0.0.1:")


def test_nothing_of_ours_is_named_by_its_path() -> None:
    argv = qemu_argv(plan(), FDS)
    assert not [word for word in argv[1:] if "/i/" in word or "/run/" in word]
    assert {f"/proc/self/fd/{fd}" for fd in (9, 10, 11, 12, 13)} <= set(re.findall(r"/proc/self/fd/\d+", " ".join(argv)))
