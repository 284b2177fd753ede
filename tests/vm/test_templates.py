"""Templates and their clones: made once, found damaged, killed at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from offloadd.template.freeze import DISK, MANIFEST, RAM, STATE
from offloadd.vm.record import read_records
from tests.conftest import World
from tests.vm.test_build import wait_until_building

SMALL = "cpu-count: 2\nmemory-size: 512\n"
MADE = "once, to be saved as a template"
ANEW = "making it anew"


@pytest.fixture(scope="module")
def own(make_world: Callable[[], World]) -> World:
    """A world with templates of its own, which a test may damage; images and environments are the real user's."""
    world = make_world()
    shared, cache = world.cache / "offload", world.root / "cache/offload"
    cache.mkdir(parents=True)
    for folder in shared.iterdir():
        if folder.name != "templates":
            (cache / folder.name).symlink_to(folder)
    world.cache = cache.parent
    world.machine("small", SMALL)
    return world


def templates(world: World) -> dict[str, Path]:
    """By their digests, those of which nothing is missing."""
    found = (world.cache / "offload/templates").glob("[0-9a-f]*/" + MANIFEST)
    return {path.parent.name: path.parent for path in found}


def build(world: World, out: Path, *options: str, step: str = "true") -> tuple[dict[str, Any], str]:
    """The record of a build, and what its user was told."""
    project = out.with_name(f"{out.name}-source")
    project.mkdir()
    done = world.run("build", "--machine", "small", *options, "-o", out, project, "--", "sh", "-c", step)
    return json.loads((out / "build.json").read_text()), done.stderr


@pytest.fixture
def digest(own: World, tmp_path: Path) -> str:
    """Of the template of `small`, which is whole."""
    record, _ = build(own, tmp_path / "prepared")
    assert record["guest"] == "clone"
    wanted = {"cpu": record["cpu"], "cpu_count": 2, "memory_mib": 512, "options": []}
    facts = {digest: json.loads((folder / MANIFEST).read_text())["facts"] for digest, folder in templates(own).items()}
    [found] = [digest for digest, made_of in facts.items() if wanted == {name: made_of[name] for name in wanted}]
    return found


def test_the_first_build_makes_a_template_for_all_that_follow(own: World, tmp_path: Path) -> None:
    assert not templates(own)
    first, told = build(own, tmp_path / "first", step="date +%F")
    assert MADE in told
    assert (first["guest"], first["cpu"]) == ("clone", "Cascadelake-Server")
    assert len(made := templates(own)) == 1

    second, told = build(own, tmp_path / "second")
    assert MADE not in told
    assert (second["guest"], set(templates(own))) == ("clone", set(made))
    assert second["boot_s"] < first["boot_s"] / 2

    # Another date on the same CPU.
    later, told = build(own, tmp_path / "later", "--date", "2020-02-02", step="date +%F > made; test $(cat made) = 2020-02-02")
    assert MADE not in told
    assert (later["guest"], later["cpu"], set(templates(own))) == ("clone", "Cascadelake-Server", set(made))

    # Another CPU.
    older, told = build(own, tmp_path / "older", "--date", "2012-02-02", step="test $(date +%F) = 2012-02-02")
    assert MADE in told
    assert (older["guest"], older["cpu"], len(templates(own))) == ("clone", "SandyBridge", 2)
    assert set(made) < set(templates(own))
    own.assert_nothing_left()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: os.truncate(folder / RAM, (folder / RAM).stat().st_size // 2), id="ram-cut-short"),
        pytest.param(lambda folder: flip(folder / STATE, (folder / STATE).stat().st_size // 2), id="state-changed"),
        pytest.param(lambda folder: (folder / DISK).unlink(), id="disk-removed"),
        pytest.param(lambda folder: (folder / MANIFEST).write_bytes(os.urandom(300)), id="manifest-garbage"),
    ],
)
def test_a_damaged_template_is_made_anew(own: World, tmp_path: Path, digest: str, damage: Callable[[Path], object]) -> None:
    # A daemon has it in memory, where nobody can damage it.
    own.run("daemon", "stop")
    damage(own.cache / "offload/templates" / digest)

    record, told = build(own, tmp_path / "out")
    assert (record["guest"], record["state"]) == ("clone", "succeeded")
    assert f"template {digest[:12]}: " in told
    assert ANEW in told
    assert MADE in told

    own.run("daemon", "stop")
    record, told = build(own, tmp_path / "next")
    assert record["guest"] == "clone"
    assert ANEW not in told
    assert MADE not in told


def test_a_template_that_is_damaged_while_the_daemon_has_it(own: World, tmp_path: Path, digest: str) -> None:
    for name in (RAM, STATE, DISK):
        os.truncate(own.cache / "offload/templates" / digest / name, 0)
    record, told = build(own, tmp_path / "out")
    assert (record["guest"], record["state"], ANEW in told) == ("clone", "succeeded", False)


@pytest.mark.parametrize(("template", "guest"), [("true", "clone"), ("false", "boot")])
def test_all_processors_are_there_when_a_build_begins(own: World, tmp_path: Path, template: str, guest: str) -> None:
    """An emulated kernel begins with one of them."""
    own.machine(f"several-{guest}", f"cpu-count: 4\nmemory-size: 512\ntemplate: {template}\n")
    record, _ = build(own, tmp_path / "out", "--machine", f"several-{guest}", step='test "$(nproc)" = 4')
    assert (record["guest"], record["state"]) == (guest, "succeeded")


def test_a_machine_that_wants_none(own: World, tmp_path: Path, digest: str) -> None:
    own.machine("plain", SMALL + "template: false\n")
    before = set(templates(own))
    record, told = build(own, tmp_path / "out", "--machine", "plain")
    assert (record["guest"], MADE in told, set(templates(own))) == ("boot", False, before)
    assert "a fresh boot of plain" in told


def test_a_guest_that_qemu_cannot_save_is_booted(own: World, tmp_path: Path, digest: str) -> None:
    # hw/nvme/ctrl.c of QEMU 7.2: `unmigratable`.
    own.machine("odd", SMALL + "options: [-blockdev, 'driver=null-co,node-name=n0', -device, 'nvme,serial=n0,drive=n0']\n")
    before = set(templates(own))
    record, told = build(own, tmp_path / "out", "--machine", "odd")
    assert (record["guest"], record["state"], set(templates(own))) == ("boot", "succeeded", before)
    [line] = [line for line in told.splitlines() if line.startswith("==> no template: ")]
    assert "nvme" in line

    # Nobody tries again, and the reason is told again.
    record, told = build(own, tmp_path / "again", "--machine", "odd")
    assert (record["guest"], MADE in told) == ("boot", False)
    [line] = [line for line in told.splitlines() if line.startswith("==> no template: ")]
    assert "nvme" in line
    own.assert_nothing_left()


def private_memory(pid: int) -> int:
    """In bytes (proc(5), smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def listening(pid: int) -> set[str]:
    """The TCP sockets on which a process listens (proc(5))."""
    held = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in held}


COUNT = 10


def test_ten_clones_at_once(own: World, tmp_path: Path) -> None:
    own.machine("many", f"cpu-count: 1\nmemory-size: 1024\nparallel-builds: {COUNT}\n")
    build(own, tmp_path / "first", "--machine", "many")
    recipe = own.recipe("endless", "steps: ['cat /proc/sys/kernel/random/uuid; while :; do sleep 1; done']\n")
    started = [own.start("build", "--machine", "many", "-o", tmp_path / f"{number}", recipe) for number in range(COUNT)]
    try:
        said = [process.stdout.readline() for process in started if process.stdout is not None]
        qemus = own.qemus()
        assert len(qemus) == COUNT
        own_memory = sorted(private_memory(pid) >> 20 for pid in qemus)
        print(f"private memory of {COUNT} clones of 1024 MiB, in MiB: {own_memory}")
        assert own_memory[-1] < 250
        # None has a port: nothing can collide.
        assert set().union(*map(listening, qemus)) == set()
    finally:
        for process in started:
            process.send_signal(signal.SIGINT)
        for process in started:
            process.communicate(timeout=120)
    assert {process.returncode for process in started} == {130}
    # Each has its own entropy.
    assert len(set(said)) == COUNT
    own.assert_nothing_left()


def test_ten_builds_at_once_succeed(own: World, tmp_path: Path) -> None:
    own.machine("many", f"cpu-count: 1\nmemory-size: 1024\nparallel-builds: {COUNT}\n")

    def one(number: int) -> tuple[dict[str, Any], str]:
        return build(own, tmp_path / f"{number}", "--machine", "many", "--date", "2020-01-01", step=f"echo {number}")

    with ThreadPoolExecutor(COUNT) as pool:
        found = list(pool.map(one, range(COUNT)))
    assert {(record["state"], record["guest"]) for record, _ in found} == {("succeeded", "clone")}
    assert len({record["instance"] for record, _ in found}) == COUNT
    own.assert_nothing_left()


def test_two_machines_of_one_template_are_two(own: World) -> None:
    for name, port in (("one", 13222), ("two", 13223)):
        own.machine(name, SMALL + f"port-forwardings: {{{port}: 22}}\n")
    look = "cat /etc/machine-id /sys/class/net/*/address; cut -d' ' -f1,2 /etc/ssh/ssh_host_*_key.pub"
    try:
        for name in ("one", "two"):
            own.run("vm", "start", name)
        first, second = (own.run("vm", "exec", name, "--", "sh", "-c", look).stdout.splitlines() for name in ("one", "two"))
    finally:
        for name in ("one", "two"):
            own.run("vm", "stop", name)
    assert len(first) == len(second) > 3
    same = set(first) & set(second)
    assert same <= {"00:00:00:00:00:00"}
    assert len(first[0]) == 32
    own.assert_nothing_left()


def open_files(world: World) -> Counter[str]:
    """What the daemon has open; sockets and pipes by their kind alone.

    Not the connections of clients, which the API's server keeps for a minute after they have hung up; nor templates.
    """
    (daemon,) = world.daemons()
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    clients = {f"socket:[{row[6]}]" for row in rows if row[-1].endswith("/offloadd.sock")}
    found = []
    for link in Path(f"/proc/{daemon}/fd").iterdir():
        with suppress(OSError):  # just closed
            found.append(str(link.readlink()))
    return Counter(name.split(":[")[0] for name in found if name not in clients and "/memfd:" not in name)


def appeared(world: World) -> Path | None:
    """The directory of a build's instance; a template's is none."""
    return next((path for path in world.instances.glob("build-*")), None)


def let_go(world: World) -> Path | None:
    """The same when QEMU's guest may run."""
    folder = appeared(world)
    try:
        return folder if folder and json.loads((folder / "instance.json").read_text())["began"] else None
    except (OSError, ValueError):
        return None


def poll(condition: Callable[[], object], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def of_waiting(world: World) -> Counter[str]:
    """What the daemon has open for clones that wait: monitor, agent and process of each."""
    count = len(world.waiting())
    return Counter(socket=2 * count, anon_inode=count)


@pytest.fixture
def restful(own: World, digest: str) -> Iterator[World]:
    """What a test leaves in the daemon is noticed."""
    before = rest = Counter[str]()
    # One that is made to wait is connected to a moment after it is there.
    while not rest or rest != before:
        before, rest = rest, open_files(own) - of_waiting(own)
        time.sleep(0.5)
    yield own
    own.assert_nothing_left()
    deadline = time.monotonic() + 30
    while (found := open_files(own) - of_waiting(own) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not found


def kill_first(world: World, signal_: signal.Signals = signal.SIGKILL) -> None:
    for pid in world.qemus():
        os.kill(pid, signal_)


def have_none_wait(world: World, folder: Path) -> None:
    """After one that waits has failed, no other is made for a minute: a build starts its own."""
    build(world, folder / "before")
    # Those of other machines may wait, too; and it may be that minute in which none is made.
    poll(lambda: any((one.plan.machine, one.purpose) == ("small", "warm") for one in read_records(world.instances)), 120)
    for pid in world.waiting():
        os.kill(pid, signal.SIGKILL)
    poll(lambda: not world.waiting())


@pytest.mark.parametrize("phase", ["starting", "before-the-agent"])
def test_a_clone_that_is_killed_before_the_build_gives_way_to_a_boot(restful: World, tmp_path: Path, phase: str) -> None:
    recipe = restful.recipe(f"killed-{phase}", "steps: ['echo built']\n")
    have_none_wait(restful, tmp_path)
    process = restful.start("build", "--machine", "small", "-o", tmp_path / "out", recipe)
    if phase == "starting":
        poll(lambda: appeared(restful) and restful.qemus())
    else:
        poll(lambda: let_go(restful))
        kill_first(restful, signal.SIGSTOP)
        time.sleep(0.3)
    kill_first(restful)
    out, err = process.communicate(timeout=120)
    # When it was as far as the build already, that is lost with it.
    if process.returncode == 75:
        assert "killed by SIGKILL" in err
        return
    assert (process.returncode, out) == (0, "built\n"), err
    assert json.loads((tmp_path / "out/build.json").read_text())["guest"] == "boot"
    assert "the template is of no use: " in err


def test_a_clone_that_is_killed_in_the_build(restful: World, tmp_path: Path) -> None:
    recipe = restful.recipe("killed-in-build", "steps: ['sleep 600']\n")
    process = restful.start("build", "--machine", "small", "-o", tmp_path / "out", recipe)
    wait_until_building(process)
    kill_first(restful)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "killed by SIGKILL" in err
    # The template is as good as it was.
    record, told = build(restful, tmp_path / "next")
    assert (record["guest"], MADE in told) == ("clone", False)


@pytest.mark.parametrize("phase", ["making", "starting", "let-go"])
def test_a_build_that_is_cancelled_leaves_nothing(restful: World, tmp_path: Path, phase: str) -> None:
    recipe = restful.recipe(f"cancelled-{phase}", "steps: ['sleep 600']\n")
    options = ["--cpu", "Nehalem"] if phase == "making" else []
    process = restful.start("build", "--machine", "small", *options, "-o", tmp_path / "out", recipe)
    if phase == "making":
        poll(lambda: list(restful.instances.glob("template-*")) and restful.qemus())
    else:
        poll(lambda: (appeared if phase == "starting" else let_go)(restful))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not list((restful.cache / "offload/templates/.making").iterdir())


def test_a_template_whose_qemu_is_killed_while_it_boots(restful: World, tmp_path: Path) -> None:
    recipe = restful.recipe("killed-making", "steps: ['true']\n")
    before = set(templates(restful))
    process = restful.start("build", "--machine", "small", "--cpu", "Westmere", "-o", tmp_path / "out", recipe)
    poll(lambda: list(restful.instances.glob("template-*")) and restful.qemus())
    time.sleep(1)
    kill_first(restful)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 75), err
    assert "killed by SIGKILL" in err
    assert set(templates(restful)) == before
    assert not list((restful.cache / "offload/templates/.making").iterdir())
    # It is no reason not to try again.
    record, _ = build(restful, tmp_path / "next", "--cpu", "Westmere")
    assert record["guest"] == "clone"


def test_the_shared_memory_of_a_removed_template_serves_who_has_it(restful: World, tmp_path: Path, digest: str) -> None:
    recipe = restful.recipe("outliving", "steps: ['for i in 1 2 3 4 5 6; do sleep 0.5; done; ls /usr | wc -l; echo fine']\n")
    process = restful.start("build", "--machine", "small", "-o", tmp_path / "out", recipe)
    wait_until_building(process)
    subprocess.run(["rm", "-r", restful.cache / "offload/templates" / digest], check=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.endswith("fine\n")
