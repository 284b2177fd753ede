"""A running QEMU from its start to its end: see `bare_qemu`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from pydantic import TypeAdapter

from offloadd.errors import BootError, HostError, MachineLostError, PortTakenError, SshError
from offloadd.model.state import MachineState
from offloadd.plan.machine import VmPlan
from offloadd.vm.instance import while_running
from offloadd.vm.process import find_process, start_ticks
from offloadd.vm.qemu import find_qemu
from offloadd.vm.qmp import open_qmp
from offloadd.vm.record import read_record

from .bare_qemu import HALT, POWER_OFF, RESET, Bench, descriptors, say, wait_for_console

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86 is not installed")


async def test_the_facts_of_a_real_qemu() -> None:
    binary = await find_qemu("qemu-system-x86_64")
    assert re.match(r"\d+\.\d+", binary.version)
    assert {"486", "core2duo", "Nehalem", "Haswell", "max"} <= binary.cpu_models
    assert not binary.cpu_models & {"Available", "x86", "Recognized", "3dnow"}
    assert await find_qemu(str(binary.path)) is binary


async def test_a_qemu_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is not installed") as caught:
        await find_qemu("qemu-system-no_thing")
    assert caught.value.hint == "apt-get install qemu-system-no-thing"
    with pytest.raises(HostError, match="/opt/qemu is not installed") as caught:
        await find_qemu("/opt/qemu")
    assert caught.value.hint == "`qemu` in the machine's file"
    with pytest.raises(HostError, match="does not work"):
        await find_qemu("/bin/false")


async def test_a_kernel_that_is_missing(bench: Bench) -> None:
    plan = bench.plan()
    assert plan.boot.kernel
    plan.boot.kernel.unlink()
    with pytest.raises(HostError, match=r"cannot hand .*m-vmlinuz to QEMU: No such file") as caught:
        async with bench.open(plan):
            pytest.fail("it did not start")
    assert caught.value.subject == "m"
    bench.assert_nothing_left()


async def test_a_kernel_that_is_none_is_told_with_qemus_own_words(bench: Bench) -> None:
    plan = bench.plan()
    assert plan.boot.kernel
    plan.boot.kernel.write_bytes(b"nothing that boots")
    with pytest.raises(BootError, match="exit status 1") as caught:
        async with bench.open(plan):
            pytest.fail("it did not start")
    assert "kernel" in caught.value.detail
    bench.assert_nothing_left()
    assert "kernel" in (bench.logs / "qemu.log").read_text()


async def test_a_wrong_option_is_told_with_qemus_own_words(bench: Bench) -> None:
    with pytest.raises(BootError) as caught:
        async with bench.open(replace(bench.plan(), options=("-no-such-option",))):
            pytest.fail("it did not start")
    assert "-no-such-option: invalid option" in caught.value.detail
    bench.assert_nothing_left()


async def test_a_disk_that_is_missing(bench: Bench) -> None:
    (bench.root / "root.ext4").unlink()
    with pytest.raises(HostError, match=r"cannot make the disk: .*No such file or directory.*root\.ext4") as caught:
        async with bench.open(bench.plan()):
            pytest.fail("it did not start")
    assert caught.value.subject == "m"
    bench.assert_nothing_left()


async def test_programs_that_are_not_installed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.plan()
    with pytest.raises(HostError, match="cannot start /nonexistent/qemu: No such file"):
        async with bench.open(replace(plan, qemu=replace(plan.qemu, binary="/nonexistent/qemu"))):
            pytest.fail("it did not start")
    bench.assert_nothing_left()
    monkeypatch.setenv("PATH", str(bench.root))
    async with bench.open(plan):
        pass  # no other program is needed to start it
    with pytest.raises(HostError, match="qemu-system-x86_64 is not installed"):
        await find_qemu("qemu-system-x86_64")


async def test_what_a_running_instance_looks_like(bench: Bench) -> None:
    async with bench.open(bench.plan(say(b"hello from the guest\r\n") + HALT)) as instance:
        await wait_for_console(instance, "hello from the guest")
        files = instance.files
        record = read_record(files.record)
        assert record == instance.record
        assert record.pid in bench.qemus()
        assert stat.S_IMODE(files.directory.stat().st_mode) == 0o700
        for path in (files.qmp, files.console, files.agent):
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(files.console_log.stat().st_mode) == 0o600
        assert set(record.ports) == {22, 80}
        for host in record.ports.values():
            with socket.create_connection(("127.0.0.1", host), timeout=5):
                pass
    assert instance.outcome is not None
    assert instance.outcome.state is MachineState.STOPPED
    bench.assert_nothing_left()
    assert "hello from the guest" in (bench.logs / "console.log").read_text()


def listens(pid: int) -> set[str]:
    """The local addresses on which a process listens (proc(5), /proc/net/tcp)."""
    sockets = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].rsplit(":", 1)[0])
    return found


async def test_ports_are_open_on_loopback_only(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        assert listens(instance.record.pid) == {"0100007F"}


async def test_qemu_runs_in_its_seccomp_sandbox(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        status = Path(f"/proc/{instance.record.pid}/status").read_text()
        assert "Seccomp:\t2" in status


def status_of(pid: int) -> dict[str, list[str]]:
    """proc(5), /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run QEMU as another user")


@as_root
async def test_below_root_qemu_is_nobody(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        status = status_of(instance.record.pid)
        uid = instance.files.disk.stat().st_uid
        assert 61184 <= uid <= 65519
        assert status["Uid"] == status["Gid"] == [str(uid)] * 4
        assert status["Groups"] == []
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[kind][0], 16) == 0
        assert status["NoNewPrivs"] == ["1"]
        assert status["Seccomp"] == ["2"]
        for path in (instance.files.disk, instance.files.console_log):
            assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (uid, 0o600)
        for path in (
            instance.files.qmp,
            instance.files.console,
            instance.files.agent,
            instance.files.qemu_log,
            instance.files.record,
        ):
            assert path.stat().st_uid == 0
    # Its log is kept, and is no business of the next one that gets the number.
    assert (bench.logs / "console.log").stat().st_uid == 0


async def test_without_root_qemu_is_its_user(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        # The other branch of the code; the whole file can also be run by a user.
        monkeypatch.setattr("offloadd.vm.launch.os.geteuid", lambda: 1000)
    async with bench.open(bench.plan()) as instance:
        assert status_of(instance.record.pid)["Uid"] == [str(os.getuid())] * 4
        assert instance.files.disk.stat().st_uid == os.getuid()
        assert stat.S_IMODE(instance.files.disk.stat().st_mode) == 0o600


def may_read(uid: int, path: Path) -> bool:
    """May the user read the file once he has got past every folder?  Tried with a descriptor that gives no right itself."""
    fd = os.open(path, os.O_PATH)
    try:
        command = ["head", "-c", "1", f"/proc/self/fd/{fd}"]
        done = subprocess.run(
            command, pass_fds=[fd], user=uid, group=uid, extra_groups=[], cwd="/", capture_output=True, check=False
        )
    finally:
        os.close(fd)
    assert done.returncode == 0 or b"Permission denied" in done.stderr
    return done.returncode == 0


@as_root
async def test_below_root_two_qemus_are_strangers(bench: Bench) -> None:
    async with bench.open(bench.plan(name="first")) as first, bench.open(bench.plan(name="second")) as second:
        one, other = (instance.files.disk.stat().st_uid for instance in (first, second))
        assert one != other
        for path in (second.files.disk, second.files.console_log):
            assert not may_read(one, path)
            assert may_read(other, path)
            # By its name not even its own.
            assert subprocess.run(["test", "-e", path], user=other, group=other, extra_groups=[], check=False).returncode == 1
    # A number that a process has is not given to a machine.
    with subprocess.Popen(["sleep", "60"], user=one, group=one, extra_groups=[]) as stranger:
        async with bench.open(bench.plan(name="third")) as third:
            assert third.files.disk.stat().st_uid not in (0, one)
        stranger.kill()
    bench.assert_nothing_left()


async def test_files_made_under_a_strict_umask_boot(bench: Bench) -> None:
    before = os.umask(0o077)
    try:
        plan = bench.plan(say(b"booted\r\n") + HALT)
        for path in (plan.boot.kernel, plan.boot.initramfs, plan.boot.disk):
            assert path
            path.chmod(0o600)
        async with bench.open(plan) as instance:
            await wait_for_console(instance, "booted")
            assert stat.S_IMODE(instance.files.console_log.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    # They are in folders of ours; nobody may ever write.
    assert stat.S_IMODE(plan.boot.disk.stat().st_mode) == (0o644 if os.geteuid() == 0 else 0o600)
    assert stat.S_IMODE(bench.root.stat().st_mode) == 0o700


async def test_virtual_cpus_are_pinned(bench: Bench) -> None:
    last = max(os.sched_getaffinity(0))
    async with bench.open(bench.plan(), cores=(last, min(os.sched_getaffinity(0)))) as instance:
        allowed = {}
        for task in Path(f"/proc/{instance.record.pid}/task").iterdir():
            name = (task / "comm").read_text().strip()
            if name.startswith("CPU "):
                status = (task / "status").read_text()
                allowed[name] = re.search(r"^Cpus_allowed_list:\t(.*)$", status, re.MULTILINE)[1]  # type: ignore[index]
        assert allowed == {"CPU 0/TCG": str(last), "CPU 1/TCG": str(min(os.sched_getaffinity(0)))}
        assert instance.record.cores == (last, min(os.sched_getaffinity(0)))


async def test_more_virtual_cpus_than_declared_are_pinned_too(bench: Bench) -> None:
    async with bench.open(replace(bench.plan(), options=("-smp", "3"))):
        pass
    bench.assert_nothing_left()


async def test_features_that_tcg_does_not_give_are_noted(bench: Bench) -> None:
    async with bench.open(replace(bench.plan(), cpu="Haswell")) as instance:
        assert "pcid" in instance.record.missing_features


async def test_a_guest_that_obeys_nothing_is_told_to_quit(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        began = trio.current_time()
        outcome = await instance.stop(polite_s=0.5)
        assert 0.5 <= trio.current_time() - began < 5
        assert (outcome.state, outcome.reason, outcome.exit_status) == (MachineState.STOPPED, "stopped by us", 0)
    bench.assert_nothing_left()


async def test_a_qemu_that_hangs_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.vm.instance.QUIT_S", 0.5)
    async with bench.open(bench.plan()) as instance:
        os.kill(instance.record.pid, signal.SIGSTOP)
        outcome = await instance.stop(polite_s=0)
        assert (outcome.state, outcome.exit_status) == (MachineState.STOPPED, -signal.SIGKILL)
    bench.assert_nothing_left()


@pytest.mark.parametrize(("code", "reason"), [(POWER_OFF, "shut down from inside"), (RESET, "rebooted from inside")])
async def test_a_guest_that_ends_by_itself(bench: Bench, code: bytes, reason: str) -> None:
    async with bench.open(bench.plan(say(b"bye\r\n") + code)) as instance:
        with trio.fail_after(60):
            outcome = await instance.wait_ended()
        assert outcome.state is MachineState.STOPPED_BY_GUEST
        assert reason in outcome.reason
        assert outcome.exit_status == 0
        assert outcome.console.endswith("bye")
    bench.assert_nothing_left()


async def test_a_qemu_that_is_killed_has_crashed(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        os.kill(instance.record.pid, signal.SIGKILL)
        with trio.fail_after(10):
            outcome = await instance.wait_ended()
        assert outcome.state is MachineState.CRASHED
        assert outcome.reason == "QEMU ended by itself (killed by SIGKILL)"
        assert outcome.exit_status == -9
        assert (await instance.stop()) is outcome
    bench.assert_nothing_left()


async def test_its_end_is_the_end_of_what_needs_it(bench: Bench) -> None:
    async with bench.open(bench.plan(say(b"last words\r\n") + HALT)) as instance:
        await wait_for_console(instance, "last words")
        with pytest.raises(MachineLostError, match="crashed: QEMU ended by itself") as caught:
            async with while_running(instance, MachineLostError):
                os.kill(instance.record.pid, signal.SIGKILL)
                await trio.sleep_forever()
        assert "last words" in caught.value.detail
        # A connection that breaks because of it is seen first: the reason is told all the same.
        with pytest.raises(MachineLostError, match="crashed"):
            async with while_running(instance, MachineLostError):
                raise SshError("the connection broke")


async def test_an_error_while_it_runs_stays_what_it_is(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        with pytest.raises(SshError, match="its own"):
            async with while_running(instance, MachineLostError):
                raise SshError("its own")
        async with while_running(instance, MachineLostError):
            pass


async def test_an_error_in_the_block_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(ValueError, match="of the block"):
        async with bench.open(bench.plan()):
            raise ValueError("of the block")
    bench.assert_nothing_left()


async def test_a_cancellation_leaves_nothing_at_any_moment(bench: Bench) -> None:
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4):
        with trio.move_on_after(delay):
            async with bench.open(bench.plan()):
                await trio.sleep_forever()
        bench.assert_nothing_left()


async def test_the_same_instance_twice(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        with pytest.raises(PortTakenError, match="runs already"):
            async with bench.open(bench.plan()):
                pytest.fail("there are two")
        assert instance.files.record.exists()
        assert instance.outcome is None
    bench.assert_nothing_left()


async def test_a_port_that_another_machine_of_ours_has(bench: Bench) -> None:
    async with bench.open(bench.plan(name="first")) as first:
        second = replace(bench.plan(name="second"), forwards=((first.port(22), 22), (0, 80)))
        with pytest.raises(PortTakenError, match="is taken by our machine first") as caught:
            async with bench.open(second):
                pytest.fail("it has the same port")
        assert caught.value.hint == "offload vm stop first"
    bench.assert_nothing_left()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_a_port_that_a_stranger_has(bench: Bench, family: socket.AddressFamily) -> None:
    with socket.socket(family) as stranger:
        stranger.bind(("" if family == socket.AF_INET else "::", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        with pytest.raises(PortTakenError) as caught:
            async with bench.open(replace(bench.plan(), forwards=((port, 22), (0, 80)))):
                pytest.fail("the port is taken")
    who = f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"
    assert caught.value.what == f"port {port} on 127.0.0.1 is taken by {who}"
    bench.assert_nothing_left()


async def test_a_port_that_is_free_again_at_once(bench: Bench) -> None:
    for _ in range(2):
        with socket.socket() as finder:
            finder.bind(("127.0.0.1", 0))
            port = finder.getsockname()[1]
        async with bench.open(replace(bench.plan(), forwards=((port, 22), (0, 80)))) as instance:
            assert instance.port(22) == port
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass


async def test_a_port_that_qemu_has_no_right_to(bench: Bench) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first < 2:
        pytest.skip("every port is free for all on this host")
    with pytest.raises(PortTakenError, match="port 1 is for privileged programs only") as caught:
        async with bench.open(replace(bench.plan(), forwards=((1, 22), (0, 80)))):
            pytest.fail("it has the port")
    assert f"above {first - 1}" in caught.value.hint
    bench.assert_nothing_left()


async def test_a_path_that_is_too_long_for_a_socket(bench: Bench) -> None:
    bench.instances = bench.root / ("x" * 100)
    with pytest.raises(HostError, match="cannot make") as caught:
        async with bench.open(bench.plan()):
            pytest.fail("no path is that long")
    assert "107 bytes" in caught.value.hint
    bench.assert_nothing_left()


async def test_no_descriptor_is_left_behind(bench: Bench) -> None:
    async def open_and_close() -> None:
        async with bench.open(bench.plan()) as instance:
            await instance.attach_disk(bench.root / "initramfs")
        with pytest.raises(BootError):
            async with bench.open(replace(bench.plan(), options=("-no-such-option",))):
                pytest.fail("it did not start")
        with pytest.raises(HostError):
            async with bench.open(replace(bench.plan(), boot=replace(bench.plan().boot, initramfs=bench.root / "none"))):
                pytest.fail("it did not start")
        with trio.move_on_after(0.05):
            async with bench.open(bench.plan()):
                await trio.sleep_forever()

    await open_and_close()  # whatever libraries open once
    before = Counter(descriptors(os.getpid()))
    for _ in range(5):
        await open_and_close()
    # What an earlier test has left may be gone by now.
    assert not Counter(descriptors(os.getpid())) - before


async def test_a_console_log_has_an_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CHECK_S": 0.02, "MAX_LOG_BYTES": 8000, "KEPT_LOG_BYTES": 2000}.items():
        monkeypatch.setattr(f"offloadd.vm.console.{name}", value)
    code = say(b"all work and no play\r\n")
    sizes: list[int] = []
    async with bench.open(bench.plan(code + b"\xe9" + (-len(code) - 3).to_bytes(2, "little", signed=True))) as instance:
        with trio.fail_after(60):
            while sum(after < before for before, after in pairwise(sizes)) < 3:
                sizes.append(instance.files.console_log.stat().st_size)
                await trio.sleep(0.005)
    kept = (bench.logs / "console.log").read_bytes()
    assert kept.startswith(b"[the beginning was too long to keep]\n")
    assert b"\0" not in kept
    assert b"all work and no play" in kept


# Write 32 KiB after 32 KiB through the BIOS (int 0x13, function 0x43), in a kernel of ours; the packet lies behind the code.
_FILL = b"\xbe\x7c\x02\xb8\x00\x43\xb2\x80\xcd\x13\x81\x44\x08\x40\x00\xeb\xef" + bytes(3)
FILL = _FILL + b"\x10\x00\x40\x00\x00\x7c\x00\x00" + bytes(8)


@pytest.fixture
async def cramped(bench: Bench) -> AsyncIterator[Bench]:
    """Its file system is too small for what a guest may write."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    bench.instances.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k,mode=700", "tmpfs", str(bench.instances)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("no right to mount")
    yield bench
    subprocess.run(["umount", "-l", bench.instances], check=True)


FULL = "the host's disk is full: what the guest wrote has no room"


async def test_a_full_disk_is_the_end(cramped: Bench) -> None:
    async with cramped.open(cramped.plan(FILL)) as instance:
        with trio.fail_after(30):
            outcome = await instance.wait_ended()
    assert (outcome.state, outcome.reason, outcome.exit_status) == (MachineState.CRASHED, FULL, -signal.SIGKILL)
    cramped.assert_nothing_left()


async def test_a_disk_that_was_full_before_the_instance_is_adopted(cramped: Bench) -> None:
    leave(cramped, cramped.plan(FILL), before="resume")
    await left_qemu(cramped)
    async with open_qmp(cramped.bridge, cramped.instances / "m/qmp.sock", "m") as qmp:
        await qmp.execute("cont")
        with trio.fail_after(30):
            while (await qmp.execute("query-status"))["status"] != "io-error":
                await trio.sleep(0.05)
    async with cramped.adopt() as instance:
        assert instance is not None
        with trio.fail_after(30):
            assert (await instance.wait_ended()).reason == FULL
    cramped.assert_nothing_left()


async def test_a_full_disk_below_one_that_stays_is_written_out_first(cramped: Bench) -> None:
    plan = cramped.plan(FILL)
    disk = cramped.instances / "disk"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    async with cramped.open(replace(plan, boot=replace(plan.boot, disk=disk), volatile=False)) as instance:
        with trio.fail_after(30):
            outcome = await instance.wait_ended()
    assert (outcome.state, outcome.reason, outcome.exit_status) == (MachineState.CRASHED, FULL, 0)
    disk.unlink()
    cramped.assert_nothing_left()


@pytest.mark.parametrize(("volatile", "status"), [(True, -signal.SIGKILL), (False, 0)], ids=["thrown away", "stays"])
async def test_a_panic_of_mach_s_ends_its_qemu(bench: Bench, volatile: bool, status: int) -> None:
    """What QEMU still holds for a disk that stays is written out by its own end."""
    code = say(b"panic ../kern/x.c:1: no more\r\n") + HALT
    disk = bench.root / "boot.raw"
    disk.write_bytes(code + bytes(510 - len(code)) + b"\x55\xaa" + bytes(1 << 20))
    boot = replace(bench.plan().boot, kernel=None, initramfs=None, disk=disk)
    plan = replace(bench.plan(), system="i586-gnu", cpu_count=1, boot=boot, disk_slots=0, volatile=volatile)
    async with bench.open(plan, cores=(0,)) as instance:
        with trio.fail_after(60):
            outcome = await instance.wait_ended()
    assert outcome.reason == "the guest's kernel panicked: no more"
    assert (outcome.state, outcome.exit_status) == (MachineState.CRASHED, status)
    bench.assert_nothing_left()


FORGETFUL = """
import os, signal, sys, trio
from offloadd.bridge import open_bridge
from offloadd.vm import instance
from pathlib import Path
from pydantic import TypeAdapter
from offloadd.plan.machine import VmPlan

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

for name in sys.argv[3:]:
    setattr(instance.Instance if hasattr(instance.Instance, name) else instance, name, die)

async def main():
    plan = TypeAdapter(VmPlan).validate_json(sys.argv[2])
    root = Path(sys.argv[1])
    async with open_bridge() as bridge:
        folders = {"instances": root / "instances", "logs": root / "logs"}
        async with instance.open_instance(plan, **folders, bridge=bridge, cores=(0, 0), purpose="machine"):
            print("running", flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


def leave(bench: Bench, plan: VmPlan, before: str | None = None) -> None:
    """Start an instance in a process that is then killed, as a daemon may be.

    Args:
        before: the function of `offloadd.vm.instance`, or of an instance, at whose call it dies; None: when the instance runs.
    """
    plan_text = TypeAdapter(VmPlan).dump_json(plan).decode()
    command = [sys.executable, "-c", FORGETFUL, str(bench.root), plan_text, *([before] if before else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == (b"" if before else b"running\n")
        owner.kill()
    assert owner.returncode == -signal.SIGKILL


async def left_qemu(bench: Bench) -> int:
    """The one that was left; it may be just becoming a QEMU."""
    with trio.fail_after(10):
        while not (found := bench.qemus()):
            await trio.sleep(0.01)
    [pid] = found
    return pid


async def test_an_instance_outlives_its_owner_and_is_adopted(bench: Bench) -> None:
    leave(bench, bench.plan(say(b"still here\r\n") + HALT))
    pid = await left_qemu(bench)
    async with bench.adopt() as instance:
        assert instance is not None
        assert (instance.record.pid, instance.name, instance.outcome) == (pid, "m", None)
        await wait_for_console(instance, "still here")
        outcome = await instance.stop(polite_s=0)
        assert (outcome.state, outcome.exit_status) == (MachineState.STOPPED, None)
    bench.assert_nothing_left()
    assert (bench.logs / "console.log").exists()


async def test_an_adopted_instance_ends_with_its_block(bench: Bench) -> None:
    leave(bench, bench.plan())
    async with bench.adopt() as instance:
        assert instance is not None
    bench.assert_nothing_left()


async def test_an_adopted_instance_that_is_killed_has_crashed(bench: Bench) -> None:
    leave(bench, bench.plan())
    async with bench.adopt() as instance:
        assert instance is not None
        os.kill(instance.record.pid, signal.SIGKILL)
        with trio.fail_after(10):
            outcome = await instance.wait_ended()
        assert outcome.state is MachineState.CRASHED
        assert "exit status unknown" in outcome.reason
    bench.assert_nothing_left()


async def test_an_instance_that_ended_while_nobody_looked(bench: Bench) -> None:
    leave(bench, bench.plan())
    pid = await left_qemu(bench)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while start_ticks(pid) is not None and time.monotonic() < deadline:
        await trio.sleep(0.01)
    async with bench.adopt() as instance:
        assert instance is None
    bench.assert_nothing_left()


async def test_a_process_that_got_the_number_of_a_dead_qemu_is_left_alone(bench: Bench) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        ticks = start_ticks(stranger.pid)
        assert ticks is not None
        assert find_process(stranger.pid, ticks - 1) is None
        found = find_process(stranger.pid, ticks)
        assert found is not None
        await found.end(5)
        assert stranger.wait() == -signal.SIGKILL
    assert find_process(stranger.pid, ticks) is None


async def gone(bench: Bench) -> None:
    """Wait until nothing is left of QEMUs that are not our children."""
    with trio.move_on_after(10):
        while bench.qemus():
            await trio.sleep(0.02)
    bench.assert_nothing_left()


async def test_a_qemu_that_was_never_written_down_is_ended(bench: Bench) -> None:
    leave(bench, bench.plan(), before="write_record")
    pid = await left_qemu(bench)
    assert not (bench.instances / "m/instance.json").exists()
    async with bench.adopt() as instance:
        assert instance is None
    with trio.move_on_after(10):
        while start_ticks(pid) is not None:
            await trio.sleep(0.02)
    await gone(bench)


@pytest.mark.parametrize("moment", ["_first_contact", "_settle"])
async def test_a_qemu_that_was_never_let_go_is_ended(bench: Bench, moment: str) -> None:
    leave(bench, bench.plan(say(b"never said") + HALT), before=moment)
    pid = await left_qemu(bench)
    record = read_record(bench.instances / "m/instance.json")
    assert record is not None
    assert (record.pid, record.began) == (pid, 0.0)
    async with bench.adopt() as instance:
        assert instance is not None
    await gone(bench)
    assert (bench.logs / "console.log").read_bytes() == b""


@pytest.mark.parametrize("moment", ["_first_contact", None])
async def test_a_qemu_that_hangs_when_it_is_found_is_killed(
    bench: Bench, moment: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offloadd.vm.instance.CONTACT_S", 0.5)
    leave(bench, bench.plan(), before=moment)
    pid = await left_qemu(bench)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(MachineLostError, match="monitor does not answer"):
        async with bench.adopt():
            pytest.fail("nobody answers")
    await gone(bench)


async def test_a_guest_that_was_about_to_be_let_go_is_let_go(bench: Bench) -> None:
    leave(bench, bench.plan(say(b"at last\r\n") + HALT), before="resume")
    async with bench.adopt() as instance:
        assert instance is not None
        await wait_for_console(instance, "at last")
    await gone(bench)


async def test_a_directory_without_anything_is_put_away(bench: Bench) -> None:
    (bench.instances / "m").mkdir(parents=True)
    (bench.instances / "m/instance.json").write_text("half of a rec")
    async with bench.adopt() as instance:
        assert instance is None
    bench.assert_nothing_left()


async def test_a_paused_instance_goes_on_as_another(bench: Bench) -> None:
    logs = bench.root / "taker"
    async with bench.open(bench.plan(say(b"before\n") + HALT), cores=(0, 0)) as instance:
        await wait_for_console(instance, "before")
        pid, before = instance.record.pid, instance.files.directory
        await instance.pause()
        cores = sorted(os.sched_getaffinity(0))[-1:] * 2
        await instance.pin(cores)
        plan = replace(instance.record.plan, instance="n", date=datetime(1999, 9, 9, tzinfo=UTC))
        await instance.hand_over(plan, "build", logs)

        assert instance.name == "n"
        assert not before.exists()
        record = read_record(bench.instances / "n/instance.json")
        assert record == instance.record
        assert (record.plan, record.purpose, record.cores, record.pid) == (plan, "build", tuple(cores), pid)
        assert 0 <= record.clock() - plan.date.timestamp() < 60
        cpus = await instance._qmp.execute("query-cpus-fast")
        assert {frozenset(os.sched_getaffinity(cpu["thread-id"])) for cpu in cpus} == {frozenset(cores)}
        assert (await instance._qmp.execute("query-status"))["status"] == "running"
        assert "before" in instance.console_tail()
    bench.assert_nothing_left()
    assert "before" in (logs / "console.log").read_text()
    assert not (bench.logs / "console.log").exists()


async def test_an_instance_cannot_take_the_name_of_another(bench: Bench) -> None:
    async with bench.open(bench.plan(name="m")) as first, bench.open(bench.plan(name="n")) as second:
        await second.pause()
        with pytest.raises(HostError, match="cannot move its files"):
            await second.hand_over(replace(second.record.plan, instance="m"), "build", bench.logs)
        assert (first.name, second.name) == ("m", "n")
    bench.assert_nothing_left()
