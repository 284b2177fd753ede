"""Childhurds as they are declared, and the plans that come of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from offloadd.config.load import parse_value
from offloadd.errors import ConfigError, UsageError
from offloadd.model.childhurd import Childhurd
from offloadd.model.kinds import KINDS
from offloadd.model.machine import VmMachine
from offloadd.model.state import MachineState
from offloadd.plan.argv import QemuFds, qemu_argv
from offloadd.plan.machine import BootFiles, VmPlan, default_qemu, plan_for_build, plan_vm
from offloadd.vm.outcome import find_panic, judge
from tests.unit.plans import X86_MODELS, day, facts

DISK = BootFiles(image="hurd", digest="abc", disk=Path("/i/disk"), disk_format="qcow2", disk_size=4 << 30)
FDS = QemuFds(qmp=7, console=8, console_log=9, disk=10, base=11)


def declare(**fields: Any) -> Childhurd:
    return Childhurd.model_validate({"kind": "childhurd", "name": "childhurd", "image": "hurd", **fields})


def plan(**fields: Any) -> VmPlan:
    return plan_vm(declare(**fields), facts(cpu_models=X86_MODELS | {"qemu64"}), DISK)


def words(argv: list[str], name: str) -> list[str]:
    return [after for word, after in pairwise(argv) if word == name]


def test_the_defaults_are_guix_s() -> None:
    found = declare()
    assert isinstance(found, VmMachine)
    assert found.systems == ("i586-gnu",)
    assert found.volatile
    assert (found.memory_size, found.cpu_count, found.date, found.overload_threshold) == (2048, 1, None, 1.8)
    assert found.port_forwardings == {11004: 1004, 10022: 22, 15900: 5900}
    assert (found.secret_retries, found.secret_handshake_timeout) == (60, 180)
    assert default_qemu(found) == default_qemu(declare(type="hurd64-qcow2")) == "qemu-system-x86_64"


def test_its_type_and_its_systems_say_the_same() -> None:
    assert declare(type="hurd64-qcow2").systems == ("x86_64-gnu",)
    assert declare(systems=["x86_64-gnu"]).type == "hurd64-qcow2"
    assert declare(systems=["hurd-i386"]).type == "hurd-qcow2"
    with pytest.raises(ValidationError, match="builds for x86_64-gnu alone, not i586-gnu"):
        declare(type="hurd64-qcow2", systems=["i586-gnu"])
    with pytest.raises(ValidationError, match="builds for i586-gnu alone, not x86_64-linux"):
        declare(systems=["x86_64-linux"])
    with pytest.raises(ValidationError, match="hurd64-qcow2"):
        declare(type="hurd")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("systems: 5", "expected a list, not 5"),
        ("systems: i586-gnu", "expected a list, not 'i586-gnu'"),
        ("systems: ''", "expected a list, not ''"),
        ("systems: [[a]]", "input should be a valid string, not ['a']"),
    ],
)
@pytest.mark.parametrize("kind", ["childhurd", "emulated-vm"])
def test_systems_of_a_wrong_form_are_told_once(kind: str, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_value(f"kind: {kind}\nname: m\nimage: i\n{line}\n", "m.yaml", KINDS[kind])
    assert [(problem.line, problem.message) for problem in caught.value.problems] == [(4, message)]


def test_an_id_that_is_too_large_is_told_once() -> None:
    with pytest.raises(ValidationError) as caught:
        declare(name="childhurd50", id=50)
    assert [error["loc"] for error in caught.value.errors()] == [("id",)]


def test_the_id_ends_the_name_and_moves_the_ports() -> None:
    assert declare(name="childhurd2", id=2).port_forwardings == {13004: 1004, 12022: 22, 17900: 5900}
    assert declare(name="childhurd2", id=2, port_forwardings={2222: 22}).ssh_forward == 2222
    for wrong in ({"id": 2}, {"id": 0}, {"id": 50, "name": "childhurd50"}, {"id": "two"}):
        with pytest.raises(ValidationError):
            declare(**wrong)


def test_an_older_image_listens_for_logins_elsewhere() -> None:
    assert declare(port_forwardings={10022: 2222}).ssh_forward == 10022
    assert declare(port_forwardings={10022: 2222, 10023: 22}).ssh_forward == 10023
    with pytest.raises(ValidationError, match="must be forwarded"):
        declare(port_forwardings={10022: 23})


def test_the_command_line_has_the_manual_s_devices_and_no_others() -> None:
    argv = qemu_argv(plan(), FDS)
    assert words(argv, "-device") == ["ide-hd,bus=ide.0,unit=0,drive=root,bootindex=0", "rtl8139,netdev=net0,romfile="]
    forwards = "hostfwd=tcp:127.0.0.1:10022-:22,hostfwd=tcp:127.0.0.1:11004-:1004,hostfwd=tcp:127.0.0.1:15900-:5900"
    assert words(argv, "-netdev") == [f"user,id=net0,restrict=on,{forwards}"]
    assert words(argv, "-machine") == ["pc"]
    assert (words(argv, "-cpu"), words(argv, "-m"), words(argv, "-smp")) == (["qemu64"], ["2048M"], ["1"])
    assert (words(argv, "-vga"), words(argv, "-vnc"), words(argv, "-display")) == (["std"], ["none"], [])
    assert "-no-reboot" in argv
    assert not [word for word in argv if "virtio" in word or "kvm" in word or "snapshot" in word]
    assert words(qemu_argv(plan(type="hurd64-qcow2"), FDS), "-machine") == ["q35"]


def test_other_options_go_to_qemu() -> None:
    argv = qemu_argv(plan(options=["--snapshot", "-boot", "menu=on"], cpu="Westmere", network=True), FDS)
    assert argv[-2:] == ["-boot", "menu=on"]
    assert words(argv, "-cpu") == ["Westmere"]
    assert "restrict" not in words(argv, "-netdev")[0]


def test_without_snapshot_the_guest_writes_to_the_disk_itself() -> None:
    kept = plan(options=[])
    assert not kept.volatile
    argv = qemu_argv(kept, replace(FDS, base=None))
    assert words(argv, "-add-fd") == ["fd=10,set=1"]
    assert words(argv, "-blockdev") == ["driver=qcow2,node-name=root,file.driver=file,file.filename=/dev/fdset/1"]
    assert plan(options=["-snapshot"]).volatile


def test_net_options_stand_for_the_whole_network() -> None:
    own = ["-device", "ne2k_pci,netdev=n", "-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:7022-:2222,hostfwd=tcp::7004-:1004"]
    kept = plan(net_options=own)
    assert kept.forwards == ((7022, 2222), (7004, 1004))
    assert declare(net_options=own).ssh_forward == 7022
    argv = qemu_argv(kept, FDS)
    assert words(argv, "-netdev") == own[3:]
    assert words(argv, "-device")[1:] == ["ne2k_pci,netdev=n"]
    build = plan_for_build(kept, "build-1", date=None, cpu=None, pinned_cpu=False)
    assert build.forwards == ((0, 2222), (0, 1004))
    assert words(qemu_argv(build, FDS), "-netdev") == ["user,id=n,hostfwd=tcp:127.0.0.1:0-:2222,hostfwd=tcp::0-:1004"]


@pytest.mark.parametrize(
    "words", [[], ["-nic", "none"], ["-netdev", "user,id=n,hostfwd=tcp::7022-:22"], ["-netdev", "user,hostfwd=tcp::7004-:1004"]]
)
def test_net_options_must_lead_into_the_guest(words: list[str]) -> None:
    with pytest.raises(ValidationError, match="must forward the guest's ports 1004 and 22"):
        declare(net_options=words)


@pytest.mark.parametrize("wrong", ["hostfwd=tcp::77777-:80", "hostfwd=tcp::0-:80", "hostfwd=tcp::7080-:77777"])
def test_net_options_have_ports_that_there_are(wrong: str) -> None:
    with pytest.raises(ValidationError, match="only 1 to 65535"):
        declare(net_options=["-netdev", f"user,id=n,hostfwd=tcp::7022-:22,hostfwd=tcp::7004-:1004,{wrong}"])


def test_a_build_has_ports_of_its_own_and_its_date() -> None:
    build = plan_for_build(plan(), "build-1", date=day("2020-01-01"), cpu=None, pinned_cpu=False)
    assert build.forwards == ((0, 22), (0, 1004))
    assert (build.cpu, build.date) == ("qemu64", day("2020-01-01"))
    with pytest.raises(UsageError):
        plan_for_build(plan(), "build-1", date=day("2040-01-01"), cpu=None, pinned_cpu=False)


def test_the_disk_can_be_larger_than_the_image() -> None:
    assert plan(disk_size="8G").boot.disk_size == 8 << 30
    assert plan().boot.disk_size == 4 << 30
    with pytest.raises(UsageError, match=r"disk-size: 2\.0 GiB is less than its image has, 4\.0 GiB"):
        plan(disk_size="2G")
    with pytest.raises(ValidationError, match="not made larger"):
        declare(disk_size="8G", options=[])


MACH = "GNU Mach 1.8\npanic ../kern/bootstrap.c:182: bootstrap_create: No bootstrap code loaded with the kernel!\n"
RESET = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}}


def test_mach_s_panic_is_no_reboot() -> None:
    assert find_panic(MACH) == "bootstrap_create: No bootstrap code loaded with the kernel!"
    assert find_panic("a panic ../kern/x.c:1: quoted\npanic: of somebody else\n") is None
    panicked = judge([RESET], asked=False, exit_status=0, stderr="", console=MACH)
    assert (panicked.state, panicked.rebooted) == (MachineState.CRASHED, False)
    assert "No bootstrap code" in panicked.reason
    assert "GNU Mach 1.8" in panicked.detail
    rebooted = judge([RESET], asked=False, exit_status=0, stderr="", console="GNU Mach 1.8\n")
    assert (rebooted.state, rebooted.rebooted) == (MachineState.STOPPED_BY_GUEST, True)
    assert not judge([RESET], asked=True, exit_status=0, stderr="", console="").rebooted
