"""What happens to hosts: files vanish, disks fill up, QEMU is upgraded, processes are killed and stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from offloadd.guest.open import STALLED
from offloadd.plan.target import TARGETS
from offloadd.template.freeze import RAM
from offloadd.vm.record import InstanceRecord, read_record, read_records
from tests.conftest import World
from tests.vm.test_build import wait_for, wait_until_building
from tests.vm.test_templates import ANEW, MADE, build, templates

SMALL = "cpu-count: 2\nmemory-size: 512\n"
OF_NO_USE = "==> the template is of no use: "


@pytest.fixture(scope="module")
def own(make_world: Callable[[], World]) -> World:
    """A world with templates of its own."""
    world = make_world()
    world.keep_own_templates()
    world.machine("small", SMALL)
    return world


def made_in(world: World, out: Path, *options: str) -> str:
    """The template that such a build uses, made when it is missing."""
    before = set(templates(world))
    build(world, out, *options)
    (made,) = set(templates(world)) - before
    return made


# Files vanish


@pytest.mark.parametrize("gone", ["ram", "everything"])
def test_clones_outlive_their_template(own: World, tmp_path: Path, gone: str) -> None:
    own.machine("pair", SMALL + "parallel-builds: 2\n")
    build(own, tmp_path / "first", "--machine", "pair")
    ((digest, folder),) = templates(own).items()
    # Afterwards it looks at pages that it has not touched before.
    step = "sleep 2; find /usr | sort | md5sum; md5sum /usr/bin/* | wc -l"
    recipe = own.recipe(f"outliving-{gone}", f"steps: ['{step}']\n")
    running = [own.start("build", "--machine", "pair", "-o", tmp_path / name, recipe) for name in ("one", "other")]
    for process in running:
        wait_until_building(process)
    if gone == "ram":
        (folder / RAM).unlink()
    else:
        shutil.rmtree(folder)
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0][0] == said[1][0]

    # The daemon has it in memory.
    record, told = build(own, tmp_path / "next", "--machine", "pair")
    assert (record["guest"], MADE in told) == ("clone", False)
    # The next daemon does not.
    own.run("daemon", "stop")
    record, told = build(own, tmp_path / "anew", "--machine", "pair")
    assert (record["guest"], MADE in told, ANEW in told) == ("clone", True, gone == "ram")
    if gone == "ram":
        assert f"template {digest[:12]}: ram: No such file or directory: {ANEW}" in told
    assert set(templates(own)) == {digest}
    own.assert_nothing_left()


# QEMU is upgraded


@dataclass
class Upgraded:
    """A QEMU that can be upgraded: a script that runs the real one, whose machine type `q35` is that of some version."""

    path: Path

    @property
    def _default(self) -> Path:
        return self.path.with_name("q35")

    def install(self, package: int) -> None:
        """Another file, as of another package."""
        new = self.path.with_suffix(".new")
        new.write_text(
            f"#!/bin/bash\n# package {package}\nread -r q35 <{self._default}\n"
            'exec qemu-system-x86_64 "${@/#q35,memory-backend/$q35,memory-backend}"\n'
        )
        new.chmod(0o755)
        new.replace(self.path)

    def be_version(self, q35: str) -> None:
        """The same file, whose machine is another: what it loads has changed."""
        self._default.write_text(f"{q35}\n")


@pytest.fixture(scope="module")
def upgraded(own: World) -> Upgraded:
    qemu = Upgraded(own.root / "bin/qemu-system-x86_64")
    qemu.path.parent.mkdir()
    # QEMU may run as another user.
    own.root.chmod(0o755)
    own.machine("packaged", SMALL + f"qemu: {qemu.path}\n")
    return qemu


def test_a_template_of_another_qemu_is_not_used(own: World, upgraded: Upgraded, tmp_path: Path) -> None:
    upgraded.be_version("pc-q35-7.2")
    upgraded.install(1)
    older = made_in(own, tmp_path / "first", "--machine", "packaged")
    upgraded.install(2)
    newer = made_in(own, tmp_path / "second", "--machine", "packaged")
    assert older != newer
    stale = {row["digest"]: row["stale"] for row in own.json("template", "list")}
    assert (stale[older], stale[newer]) == ("saved by another QEMU", "")

    # Of this, no fact of the template tells: QEMU has become another one between the template's loading and the clone's start.
    wait_for(lambda: [one for one in read_records(own.instances) if (one.plan.machine, one.purpose) == ("packaged", "warm")])
    upgraded.be_version("pc-q35-7.1")
    for pid in own.waiting():  # what was started before is of use still
        os.kill(pid, signal.SIGKILL)
    record, told = build(own, tmp_path / "third", "--machine", "packaged")
    assert (record["guest"], record["state"]) == ("boot", "succeeded")
    [why] = [line for line in told.splitlines() if line.startswith(OF_NO_USE)]
    assert "Machine type received is 'pc-q35-7.2' and local is 'pc-q35-7.1'" in why
    assert newer not in templates(own)

    record, told = build(own, tmp_path / "fourth", "--machine", "packaged")
    assert (record["guest"], MADE in told, newer in templates(own)) == ("clone", True, True)
    own.assert_nothing_left()


# The disk is full


@pytest.fixture
def cramped(make_world: Callable[[], World]) -> Iterator[World]:
    """A world whose templates have 40 MiB."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    world = make_world()
    small = world.root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "offload-test", small], check=True)
    world.keep_own_templates(small)
    world.machine("small", SMALL)
    yield world
    world.stop_daemon()
    subprocess.run(["umount", small], check=True)


def test_a_disk_that_is_full_while_a_template_is_made(cramped: World, tmp_path: Path) -> None:
    small = cramped.root / "small"
    record, told = build(cramped, tmp_path / "first")
    assert (record["guest"], record["state"]) == ("boot", "succeeded")
    [why] = [line for line in told.splitlines() if line.startswith("==> no template: ")]
    assert "template: the disk is full at " in why
    assert why.endswith(record["why_booted"])
    assert not list((small / ".making").iterdir())
    assert not templates(cramped)
    assert os.statvfs(small).f_bfree * os.statvfs(small).f_frsize > 39 << 20

    subprocess.run(["mount", "-o", "remount,size=400m", small], check=True)
    record, told = build(cramped, tmp_path / "second")
    assert (record["guest"], MADE in told, len(templates(cramped))) == ("clone", True, 1)
    cramped.assert_nothing_left()


def test_a_cache_that_cannot_be_written(cramped: World, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", cramped.root / "small"], check=True)
    record, told = build(cramped, tmp_path / "out")
    assert (record["guest"], record["state"]) == ("boot", "succeeded")
    [why] = [line for line in told.splitlines() if line.startswith("==> no template: ")]
    assert "Read-only file system" in why


# The guest breaks


@dataclass
class Breakable:
    """A machine whose kernel takes orders from its serial line (Linux' admin-guide/sysrq.rst)."""

    world: World
    monitor: Path

    def order(self, key: str) -> None:
        """Send the break, and then the key, to the one that runs."""
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as qmp:
            connection.connect(str(self.monitor))
            qmp.readline()
            send_break = {"execute": "chardev-send-break", "arguments": {"id": "console"}}
            for command in ({"execute": "qmp_capabilities"}, send_break):
                qmp.write(json.dumps(command))
                qmp.flush()
                assert "return" in json.loads(qmp.readline())
        (console,) = self.world.instances.glob("build-*/console.sock")
        # Left again at once: who does not read what the guest says stands in its way.
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(console))
            connection.sendall(key.encode())


@pytest.fixture(scope="module")
def breakable(own: World) -> Breakable:
    folder = own.root / "monitors"
    folder.mkdir()
    folder.chmod(0o777)  # QEMU may run as another user
    own.root.chmod(0o755)
    target = TARGETS["x86_64"]
    kernel = " ".join(
        ("root=/dev/vda console=ttyS0 panic=-1 quiet maxcpus=1 sysrq_always_enabled", *target.kernel, *target.kernel_smp)
    )
    monitor = folder / "qmp"
    own.machine("breakable", SMALL + f"options: [-append, '{kernel}', -qmp, 'unix:{monitor},server=on,wait=off']\n")
    return Breakable(own, monitor)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        pytest.param("c", ["the guest's kernel panicked: sysrq triggered crash", "console:"], id="panic"),
        pytest.param("i", ["the agent ended, and was started again"], id="agent-killed"),
    ],
)
def test_a_guest_that_breaks_in_mid_build(breakable: Breakable, tmp_path: Path, key: str, words: list[str]) -> None:
    world = breakable.world
    recipe = world.recipe(f"broken-{key}", "steps: ['sleep 600']\n")
    process = world.start("build", "--machine", "breakable", "-o", tmp_path / "out", recipe)
    wait_until_building(process)
    breakable.order(key)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert not [word for word in words if word not in err], err
    assert "Traceback" not in err
    world.assert_nothing_left()
    # Nothing is wrong with the machine or its template.
    record, told = build(world, tmp_path / "next", "--machine", "breakable")
    assert (record["guest"], MADE in told) == ("clone", False)


@dataclass
class Stalling:
    """Guests that stall: a QEMU whose guests find no port for their agent, and on their console what a kernel says that stalls.

    A stand-in: what makes a kernel stall cannot be had when it is wanted.
    """

    path: Path

    def install(self) -> None:
        self.path.write_text(
            f"""#!/bin/bash
            for word in "$@"; do
                if [[ $word =~ logfile=/proc/self/fd/([0-9]+) ]] && (($(<{self._left}) > 0)); then
                    echo $(($(<{self._left}) - 1)) >{self._left}
                    echo "rcu: rcu_preempt {STALLED} for 5255 jiffies!" >&"${{BASH_REMATCH[1]}}"
                    set -- "${{@/name=org.offload.agent/name=nobody}}"
                fi
            done
            exec qemu-system-x86_64 "$@"
            """
        )
        self.path.chmod(0o755)

    @property
    def _left(self) -> Path:
        return self.path.with_name("left")

    def stall(self, boots: int) -> None:
        """That many boots from now on."""
        self._left.write_text(f"{boots}\n")
        self._left.chmod(0o666)  # QEMU may run as another user


@pytest.fixture(scope="module")
def stalling(own: World) -> Stalling:
    qemu = Stalling(own.root / "stalling/qemu-system-x86_64")
    qemu.path.parent.mkdir()
    own.root.chmod(0o755)
    qemu.install()
    qemu.stall(0)
    for name, template in (("stalls", "true"), ("stalls-booted", "false")):
        own.machine(name, SMALL + f"qemu: {qemu.path}\ntemplate: {template}\n")
    return qemu


AGAIN = ": its kernel gets no interrupts of a timer; booting it once more"


@pytest.mark.parametrize(("machine", "guest"), [("stalls", "clone"), ("stalls-booted", "boot")])
def test_a_boot_that_stalls_is_tried_again(own: World, stalling: Stalling, tmp_path: Path, machine: str, guest: str) -> None:
    stalling.stall(1)
    record, told = build(own, tmp_path / "out", "--machine", machine)
    assert (record["guest"], record["state"]) == (guest, "succeeded")
    assert told.count(AGAIN) == 1
    own.assert_nothing_left()


def test_a_boot_that_stalls_twice(own: World, stalling: Stalling, tmp_path: Path) -> None:
    stalling.stall(2)
    recipe = own.recipe("stalled", "steps: ['true']\n")
    err = own.run("build", "--machine", "stalls-booted", "-o", tmp_path / "out", recipe, status=75).stderr
    assert err.count(AGAIN) == 1
    assert "offload: stalls-booted: its kernel gets no interrupts of a timer" in err
    assert f"| rcu: rcu_preempt {STALLED} for 5255 jiffies!" in err
    own.assert_nothing_left()


# Time goes on without the guest


def test_a_machine_that_stood_still(own: World, tmp_path: Path) -> None:
    """As when the host was suspended, or had no time for it: its clock is still the one that builds are measured by."""
    own.machine("kept", SMALL + "port-forwardings: {12922: 22}\n")
    own.run("vm", "start", "kept")
    pid = own.json("vm", "show", "kept")["instance"]["pid"]
    recipe = own.recipe("interrupted", "steps: ['for i in 1 2 3 4; do sleep 0.5; done; date +%F']\n")
    process = own.start("build", "--machine", "kept", "--keep-machine", "-o", tmp_path / "during", recipe)
    wait_until_building(process)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(pid, signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "2020-01-01\n"), err
    assert "warning" not in err

    done = own.run("build", "--machine", "kept", "--keep-machine", "-o", tmp_path / "after", recipe)
    assert done.stdout == "2020-01-01\n"
    for name in ("during", "after"):
        assert json.loads((tmp_path / name / "build.json").read_text())["guest"] == "kept"
    record = read_record(own.instances / "kept/instance.json")
    assert record is not None
    before = record.clock()
    shown = float(own.run("vm", "exec", "kept", "--", "date", "+%s.%N").stdout)
    assert before - 1 < shown < record.clock() + 1
    own.run("vm", "stop", "kept")
    own.assert_nothing_left()


# Again and again

AT_ONCE = 3
ENDS = ("ends", "killed", "cancelled", "cancelled-early", "told-to-end")
"""In this order on each machine: three failures in a row, and it would be left alone for a while."""
WARM_UP, ROUNDS = 5, 17
"""Of each of `AT_ONCE`; the second are fifty in all."""
GROWTH = 8 << 20
"""Bytes that the daemon may grow in all rounds: what it keeps of each build is on the disk."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What the daemon holds, and what lies around."""

    descriptors: int
    memory_files: int
    threads: int
    children: int
    files: frozenset[str]
    """Below the state and runtime directories, but those of ended builds."""
    resident: int
    """Bytes."""


PASSING = re.compile(r"/(builds/|instances/warm-)")
"""Ended builds, and clones that wait: of those there are others each time."""


def footprint(world: World) -> Footprint:
    (daemon,) = world.daemons()
    links = []
    for link in Path(f"/proc/{daemon}/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{daemon}/status").read_text().splitlines())
    children = [tuple(path.read_text().split()) for path in Path(f"/proc/{daemon}/task").glob("*/children")]
    found = [path for folder in (world.state, world.root / "run") for path in folder.rglob("*")]
    return Footprint(
        descriptors=len(links),
        memory_files=sum("memfd:" in link for link in links),
        threads=int(status["Threads"]),
        children=sum(map(len, children)),
        files=frozenset(str(path) for path in found if not PASSING.search(str(path.relative_to(world.root)))),
        resident=int(status["VmRSS"].split()[0]) << 10,
    )


def at_rest(world: World, waiting: int) -> Footprint:
    """Once worker threads have found nothing to do, all that ended is gone, and so many clones wait."""
    world.assert_nothing_left()

    def rests() -> bool:
        found = footprint(world)
        return found.threads <= 3 and found.children == waiting == len(world.waiting())

    wait_for(rests, 60)
    return footprint(world)


def test_fifty_starts_and_kills_leave_nothing(own: World, tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(AT_ONCE)]
    for name in names:
        own.machine(name, SMALL)
    quick, endless = own.recipe("quick", "steps: ['true']\n"), own.recipe("endless", "steps: ['sleep 600']\n")

    def record_of(machine: str) -> InstanceRecord | None:
        records = read_records(own.instances)
        found = [record for record in records if record.plan.machine == machine and record.purpose != "warm"]
        return found[0] if found else None

    def one(machine: str, end: str) -> None:
        recipe = quick if end == "ends" else endless
        process = own.start("build", "--machine", machine, "-o", tmp_path / f"out-{machine}", recipe)
        if end == "cancelled-early":
            wait_for(lambda: record_of(machine))
        elif end != "ends":
            wait_until_building(process)
        if end.startswith("cancelled"):
            process.send_signal(signal.SIGINT)
        elif end != "ends":
            found = record_of(machine)
            assert found is not None
            os.kill(found.pid, signal.SIGKILL if end == "killed" else signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        wanted = {"ends": 0, "killed": 75, "told-to-end": 75}.get(end, 130)
        assert process.returncode == wanted, (end, err)
        assert "Traceback" not in err

    def work(name: str, count: int) -> None:
        for number in range(count):
            one(name, ENDS[number % len(ENDS)])

    def all_work(count: int) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(work, name, count) for name in names]:
                done.result()

    own.run("daemon", "stop", status=None)
    build(own, tmp_path / "first", "--machine", "m0")
    all_work(WARM_UP)
    before = at_rest(own, AT_ONCE)
    assert before.memory_files == 3  # one template
    all_work(ROUNDS)
    after = at_rest(own, AT_ONCE)

    print(f"the daemon has grown by {(after.resident - before.resident) >> 10} KiB from {before.resident >> 10} KiB")
    assert after.files == before.files
    assert (after.descriptors, after.memory_files, after.children) == (before.descriptors, before.memory_files, AT_ONCE)
    assert after.resident - before.resident < GROWTH
    # The template has stood all of it, and its memory is given back with it.
    record, told = build(own, tmp_path / "last", "--machine", "m0")
    assert (record["guest"], MADE in told) == ("clone", False)
    for digest in templates(own):
        own.run("template", "rm", digest)
    assert footprint(own).memory_files == 0
