"""Real QEMUs without a system in them: their kernels are a few instructions of ours."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
from pydantic import TypeAdapter

from offloadd.bridge import Bridge, open_bridge
from offloadd.errors import BootError, HostError, MachineLostError, PortTakenError, SshError
from offloadd.model.state import MachineState
from offloadd.plan.argv import InstanceFiles, qemu_argv
from offloadd.plan.machine import BootFiles, QemuFacts, VmPlan
from offloadd.vm.instance import Instance, adopt_instance, open_instance, while_running
from offloadd.vm.process import find_process, start_ticks
from offloadd.vm.qemu import find_qemu
from offloadd.vm.record import read_record

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86 is not installed")

# 16-bit code.  Say what is said on the serial port, then halt for ever / power off (PIIX4's PM1a control) / reset (keyboard).
HALT = b"\xfa\xf4\xeb\xfd"
POWER_OFF = b"\xba\x04\x06\xb8\x00\x20\xef" + HALT
RESET = b"\xb0\xfe\xe6\x64" + HALT


def say(text: bytes) -> bytes:
    return b"\xba\xf8\x03" + b"".join(b"\xb0%c\xee" % byte for byte in text)


def kernel(code: bytes) -> bytes:
    """The real-mode part of a Linux kernel (Linux: Documentation/arch/x86/boot.rst) with other code."""
    image = bytearray(8192)
    image[0x1F1] = 4  # sectors of set-up code
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = b"\xeb\x66"  # jump over the header
    image[0x202:0x206] = b"HdrS"
    image[0x206:0x208] = b"\x0c\x02"  # protocol 2.12
    image[0x211] = 1  # loaded high
    image[0x22C:0x230] = b"\xff\xff\xff\x37"  # where the initramfs may end
    image[0x268 : 0x268 + len(code)] = code
    return bytes(image)


class Bench:
    """Plans and directories for one test."""

    def __init__(self, root: Path, bridge: Bridge, facts: QemuFacts) -> None:
        self.root = root
        self.bridge = bridge
        self.instances = root / "instances"
        self.logs = root / "logs"
        self._facts = facts
        (root / "initramfs").write_bytes(bytes(512))
        with (root / "root.ext4").open("wb") as disk:
            disk.truncate(1 << 20)

    def plan(self, code: bytes = HALT, name: str = "m") -> VmPlan:
        path = self.root / f"{name}-vmlinuz"
        path.write_bytes(kernel(code))
        boot = BootFiles(image="i", digest="d", kernel=path, initramfs=self.root / "initramfs", disk=self.root / "root.ext4")
        return VmPlan(
            machine=name,
            instance=name,
            system="x86_64-linux",
            qemu=self._facts,
            boot=boot,
            cpu="qemu64",
            cpu_count=2,
            memory_mib=128,
            date=datetime(2020, 1, 1, tzinfo=UTC),
            forwards=((0, 22), (0, 1004)),
            network=False,
            boot_timeout_s=60.0,
            options=(),
        )

    def open(self, plan: VmPlan, cores: tuple[int, ...] = (0, 0)) -> AbstractAsyncContextManager[Instance]:
        return open_instance(plan, instances=self.instances, logs=self.logs, bridge=self.bridge, cores=cores, purpose="machine")

    def adopt(self, name: str = "m") -> AbstractAsyncContextManager[Instance | None]:
        return adopt_instance(self.instances / name, logs=self.logs, bridge=self.bridge)

    def qemus(self) -> list[int]:
        """Our QEMUs, zombies too."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
                command = (path.parent / "cmdline").read_bytes()
            except OSError:
                continue
            zombie = parent == os.getpid() and path.read_text().split()[1].startswith("(qemu-system")
            if zombie or (str(self.root).encode() in command and b"qemu-system" in command.split(b"\0")[0]):
                found.append(int(path.parent.name))
        return found

    def assert_nothing_left(self) -> None:
        assert self.qemus() == []
        assert not list(self.instances.glob("*"))


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for sockets."""
    root = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    yield root
    shutil.rmtree(root)


@pytest.fixture
async def bench(short: Path) -> AsyncIterator[Bench]:
    binary = await find_qemu("qemu-system-x86_64")
    facts = QemuFacts(binary=str(binary.path), version=binary.version, cpu_models=binary.cpu_models, accelerator="tcg")
    async with open_bridge() as bridge:
        made = Bench(short, bridge, facts)
        yield made
        for pid in made.qemus():
            os.kill(pid, signal.SIGKILL)


async def wait_for_console(instance: Instance, text: str) -> None:
    with trio.fail_after(60):
        while text not in instance.console_tail():
            await trio.sleep(0.05)


async def test_the_facts_of_a_real_qemu() -> None:
    binary = await find_qemu("qemu-system-x86_64")
    assert re.match(r"\d+\.\d+", binary.version)
    assert {"486", "core2duo", "Nehalem", "Haswell", "max"} <= binary.cpu_models
    assert not binary.cpu_models & {"Available", "x86", "Recognized", "3dnow"}
    assert await find_qemu(str(binary.path)) is binary


async def test_a_qemu_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is not installed") as caught:
        await find_qemu("qemu-system-nothing")
    assert caught.value.hint == "apt-get install qemu-system-misc"
    with pytest.raises(HostError, match="does not work"):
        await find_qemu("/bin/false")


async def test_a_kernel_that_is_missing_is_told_with_qemus_own_words(bench: Bench) -> None:
    plan = bench.plan()
    plan.boot.kernel.unlink()
    with pytest.raises(BootError, match="exit status 1") as caught:
        async with bench.open(plan):
            pytest.fail("it did not start")
    assert "vmlinuz" in caught.value.detail
    assert caught.value.subject == "m"
    bench.assert_nothing_left()
    assert "vmlinuz" in (bench.logs / "qemu.log").read_text()


async def test_a_wrong_option_is_told_with_qemus_own_words(bench: Bench) -> None:
    with pytest.raises(BootError) as caught:
        async with bench.open(replace(bench.plan(), options=("-no-such-option",))):
            pytest.fail("it did not start")
    assert "-no-such-option: invalid option" in caught.value.detail
    bench.assert_nothing_left()


async def test_a_disk_that_is_missing(bench: Bench) -> None:
    (bench.root / "root.ext4").unlink()
    with pytest.raises(HostError, match="cannot make the disk") as caught:
        async with bench.open(bench.plan()):
            pytest.fail("it did not start")
    assert "root.ext4" in caught.value.detail
    bench.assert_nothing_left()


async def test_programs_that_are_not_installed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.plan()
    with pytest.raises(HostError, match="cannot start /nonexistent/qemu: No such file"):
        async with bench.open(replace(plan, qemu=replace(plan.qemu, binary="/nonexistent/qemu"))):
            pytest.fail("it did not start")
    bench.assert_nothing_left()
    monkeypatch.setenv("PATH", str(bench.root))
    with pytest.raises(HostError, match="qemu-img is not installed") as caught:
        async with bench.open(plan):
            pytest.fail("it did not start")
    assert "qemu-utils" in caught.value.hint
    bench.assert_nothing_left()
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
        for path in (files.qmp, files.console):
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(files.console_log.stat().st_mode) == 0o600
        assert set(record.ports) == {22, 1004}
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
        second = replace(bench.plan(name="second"), forwards=((first.port(22), 22), (0, 1004)))
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
            async with bench.open(replace(bench.plan(), forwards=((port, 22), (0, 1004)))):
                pytest.fail("the port is taken")
    who = f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"
    assert caught.value.what == f"port {port} on 127.0.0.1 is taken by {who}"
    bench.assert_nothing_left()


async def test_a_port_that_is_free_again_at_once(bench: Bench) -> None:
    for _ in range(2):
        with socket.socket() as finder:
            finder.bind(("127.0.0.1", 0))
            port = finder.getsockname()[1]
        async with bench.open(replace(bench.plan(), forwards=((port, 22), (0, 1004)))) as instance:
            assert instance.port(22) == port
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass


async def test_a_path_that_is_too_long_for_a_socket(bench: Bench) -> None:
    bench.instances = bench.root / ("x" * 100)
    with pytest.raises(HostError, match="cannot make") as caught:
        async with bench.open(bench.plan()):
            pytest.fail("no path is that long")
    assert "107 bytes" in caught.value.hint
    bench.assert_nothing_left()


async def test_a_disk_is_plugged_in(bench: Bench) -> None:
    path = bench.root / "env.squashfs"
    path.write_bytes(bytes(4096))
    async with bench.open(bench.plan()) as instance:
        await instance.attach_disk(path, "env-1")
        with pytest.raises(MachineLostError, match="QEMU refused blockdev-add"):
            await instance.attach_disk(path, "env-1")
        with pytest.raises(MachineLostError, match="QEMU refused"):
            await instance.attach_disk(bench.root / "nothing", "env-2")


FORGETFUL = """
import sys, trio
from offloadd.bridge import open_bridge
from offloadd.vm.instance import open_instance
from pathlib import Path
from pydantic import TypeAdapter
from offloadd.plan.machine import VmPlan

async def main():
    plan = TypeAdapter(VmPlan).validate_json(sys.argv[2])
    root = Path(sys.argv[1])
    async with open_bridge() as bridge:
        folders = {"instances": root / "instances", "logs": root / "logs"}
        async with open_instance(plan, **folders, bridge=bridge, cores=(0, 0), purpose="machine"):
            print("running", flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


def leave(bench: Bench, plan: VmPlan) -> None:
    """Start an instance in a process that is then killed, as a daemon may be."""
    plan_text = TypeAdapter(VmPlan).dump_json(plan).decode()
    with subprocess.Popen([sys.executable, "-c", FORGETFUL, bench.root, plan_text], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"running\n"
        owner.kill()


async def test_an_instance_outlives_its_owner_and_is_adopted(bench: Bench) -> None:
    leave(bench, bench.plan(say(b"still here\r\n") + HALT))
    [pid] = bench.qemus()
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
    [pid] = bench.qemus()
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


async def test_a_qemu_that_was_never_written_down_is_ended(bench: Bench) -> None:
    plan = bench.plan()
    files = InstanceFiles(bench.instances / "m")
    files.directory.mkdir(parents=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", files.disk, "1M"], check=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(files.qmp))
        listener.listen(1)
        descriptor = listener.fileno()
        with subprocess.Popen(qemu_argv(plan, files, descriptor), pass_fds=[descriptor]) as qemu:
            listener.close()
            async with bench.adopt() as instance:
                assert instance is None
            assert qemu.wait(10) == 0
    bench.assert_nothing_left()


async def test_a_directory_without_anything_is_put_away(bench: Bench) -> None:
    (bench.instances / "m").mkdir(parents=True)
    (bench.instances / "m/instance.json").write_text("half of a rec")
    async with bench.adopt() as instance:
        assert instance is None
    bench.assert_nothing_left()
