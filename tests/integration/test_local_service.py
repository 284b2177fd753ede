"""Builds on this host: the real build service in a real environment, as whoever runs the tests."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import stat
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver, unpack_outputs
from offloadd.builder.run import run_build
from offloadd.environment.recipe import environment_recipe
from offloadd.environment.root import RootStore
from offloadd.environment.store import Environment, EnvironmentStore
from offloadd.errors import EmulatorFault, HostError, NotAllowedError, ProtocolError, SshError
from offloadd.model.system import SYSTEMS
from offloadd.place import limits, local
from offloadd.place.local import LocalService, open_local_place
from offloadd.spare_user import FIRST_UID, LAST_UID

from .test_build_service import mark, processes_named, wait_until_gone

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"


class Listener:
    def __init__(self) -> None:
        self.text = ""

    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def collecting(self) -> None: ...

    def log(self, text: str) -> None:
        self.text += text


class Host:
    """This host with an environment, and what a build there says."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.root = root
        self.state = folder / "work"
        self.outputs = folder / "outputs.tar"
        self.listener = Listener()
        self.source = folder / "source.tar"
        with tarfile.open(self.source, "w") as tar:
            info = tarfile.TarInfo("a.txt")
            info.size, info.mtime = 6, 1_500_000_000
            tar.addfile(info, io.BytesIO(b"hello\n"))

    async def build(self, *steps: str, service: LocalService | None = None, **changes: Any) -> Report:
        self.outputs.unlink(missing_ok=True)
        self.listener = Listener()
        values: dict[str, Any] = {
            "build": "b1",
            "name": "hello-1",
            "steps": steps,
            "env": {},
            "outputs": (),
            "source": self.source,
            "environment": str(self.root),
            "set_clock": None,
            "expected_clock": time.time,
            "timeout_s": 60.0,
            "max_silent_s": 60.0,
            "keep_failed": False,
        }
        with open_outputs_receiver(self.outputs) as outputs:
            job = Job(**values | changes)
            return await run_build(service or LocalService(self.state), job, outputs, self.listener)

    @property
    def log(self) -> str:
        return self.listener.text

    async def wait_for_log(self, text: str) -> None:
        with trio.fail_after(30):
            while text not in self.listener.text:
                await trio.sleep(0.01)

    def assert_nothing_left(self) -> None:
        assert list(self.state.iterdir()) == []
        assert str(self.folder) not in Path("/proc/self/mountinfo").read_text()
        assert processes_named(str(self.state)) == []


@pytest.fixture
async def environment() -> Environment:
    """The smallest environment of this host's own architecture, from the real cache: it takes half a minute to make."""
    native = next(system for system in SYSTEMS.values() if system.name == "x86_64-linux")
    return await EnvironmentStore(CACHE / "environments").ensure(environment_recipe("bookworm", native.debian))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> RootStore:
    return RootStore(tmp_path_factory.mktemp("cache") / "roots")


@pytest.fixture
async def host(tmp_path: Path, environment: Environment, roots: RootStore) -> AsyncIterator[Host]:
    async with roots.open(environment) as root:
        yield Host(tmp_path, root)


def tree(root: Path) -> dict[str, tuple[Any, ...]]:
    """What is at the top of a root and in its /etc: a build that writes there changes one of them."""
    found = {}
    for path in [root, *root.iterdir(), *(root / "etc").iterdir()]:
        about = path.lstat()
        found[str(path)] = (about.st_mode, about.st_uid, about.st_mtime_ns, about.st_size)
    return found


# Builds


async def test_from_source_to_outputs(host: Host, tmp_path: Path) -> None:
    before = tree(host.root)
    steps = ["tr a-z A-Z < a.txt > b.txt; mkdir -p dist; cp b.txt dist; chmod 700 b.txt", "id; pwd; echo $HOME; touch ~/x"]
    report = await host.build(*steps, outputs=("*.txt", "dist"))
    assert (report.exit_status, report.missing_outputs) == (0, ())
    assert host.log.splitlines() == ["uid=1000(build) gid=1000(build) groups=1000(build)", "/build/hello-1", "/build"]
    unpack_outputs(host.outputs, tmp_path / "out")
    assert (tmp_path / "out/dist/b.txt").read_text() == "HELLO\n"
    assert (tmp_path / "out/b.txt").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "out/a.txt").stat().st_mtime == 1_500_000_000
    assert report.clock_end is not None
    assert abs(report.clock_end - time.time()) < 30
    assert abs(report.clock_drift_s) < 5
    assert tree(host.root) == before
    host.assert_nothing_left()


async def test_a_step_that_fails_keeps_its_directory(host: Host, tmp_path: Path) -> None:
    report = await host.build("true", "echo x > made; exit 7", keep_failed=True)
    assert (report.exit_status, report.failed_step) == (7, 2)
    unpack_outputs(host.outputs, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.txt", "made"}


async def test_the_state_directory_is_ours_alone(host: Host) -> None:
    """What a build leaves may be a program that runs as its user for whoever starts it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.build, f"echo ready; sleep {mark(7100)}")
        await host.wait_for_log("ready")
        assert host.state.stat().st_mode & 0o777 == 0o700
        assert (host.state / "b1").stat().st_mode & 0o777 == 0o700
        nursery.cancel_scope.cancel()
    host.assert_nothing_left()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives builds users of their own")
async def test_builds_run_as_users_that_nobody_else_is(host: Host) -> None:
    """Inside it is always 1000, which on the host is somebody."""
    for name in ("b1", "b2"):
        (host.folder / name).mkdir()
    second = Host(host.folder / "b2", host.root)
    second.state = host.state
    async with trio.open_nursery() as nursery:
        for number, each in enumerate((host, second)):
            nursery.start_soon(_run, each, f"b{number}", f"id -u; echo ready; sleep {mark(7200 + number)}")
            await each.wait_for_log("ready")
            assert each.log == "1000\nready\n"
        users = [await _owner(mark(7200 + number)) for number in range(2)]
        nursery.cancel_scope.cancel()
    assert len(set(users)) == 2
    assert all(FIRST_UID <= user <= LAST_UID for user in users)
    host.assert_nothing_left()


async def _run(host: Host, build: str, step: str) -> None:
    await host.build(step, build=build)


async def _owner(words: str) -> int:
    """The user of the process that sleeps; the shell says that it is ready before it starts it."""
    with trio.fail_after(60):
        while True:
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    command = (path / "cmdline").read_bytes().split(b"\0")
                    if command[0].endswith(b"sleep") and words.encode() in command:
                        return path.stat().st_uid
                except OSError:
                    continue
            await trio.sleep(0.05)


@pytest.mark.parametrize(("personality", "machine"), [(None, os.uname().machine), ("linux32", "i686")])
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the names of a PC")
async def test_the_personality(host: Host, personality: str | None, machine: str) -> None:
    await host.build("uname -m; uname -m", personality=personality)
    assert host.log.split() == [machine, machine]


async def test_addresses_are_not_randomized(host: Host) -> None:
    # Stack and heap of two processes; linux/personality.h has the number.
    await host.build("for _ in 1 2; do grep -E 'stack|heap' /proc/self/maps | cut -d' ' -f1; done; cat /proc/self/personality")
    *maps, personality = host.log.split()
    assert maps
    assert maps[: len(maps) // 2] == maps[len(maps) // 2 :]
    assert int(personality, 16) & 0x0040000


async def test_without_the_network(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        step = f"grep -c : /proc/net/dev; exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]} && echo connected"
        report = await host.build(f"bash -c '{step}'")
    assert report.exit_status != 0
    assert host.log.startswith("1\n")
    assert "connected" not in host.log


async def test_with_the_network(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        step = f"cat /etc/resolv.conf; exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]} && echo connected"
        report = await host.build(f"bash -c '{step}'", "echo x > /etc/resolv.conf || echo kept", network=True)
    assert report.exit_status == 0
    resolver = Path("/etc/resolv.conf")
    assert host.log.startswith(resolver.read_text() if resolver.exists() else "")
    assert "connected" in host.log
    assert host.log.endswith("kept\n")
    assert (host.root / "etc/resolv.conf").read_text() == ""


async def test_the_clock_of_the_host_is_not_a_build_s(host: Host) -> None:
    before = time.time()
    with pytest.raises(ProtocolError, match="the clock of this host is not a build's to set"):
        await host.build("true", set_clock=1_577_836_800, expected_clock=lambda: 1_577_836_800.0)
    assert abs(time.time() - before) < 30


async def test_an_environment_that_is_gone(host: Host, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"the build service: cannot mount .*nowhere on lower"):
        await host.build("true", environment=str(tmp_path / "nowhere"))
    host.assert_nothing_left()


@pytest.mark.parametrize("name", ["a:b,c\\d", "with space"])
async def test_a_state_directory_with_any_name(host: Host, name: str) -> None:
    """In the options of an overlay some characters have a meaning."""
    await host.build("cat a.txt; touch /build/x", service=LocalService(host.folder / name))
    assert host.log == "hello\n"
    assert list((host.folder / name).iterdir()) == []


# Ends


async def test_cancelled(host: Host) -> None:
    steps = f"trap '' TERM HUP INT; (setsid sleep {mark(7300)} &); echo ready; while :; do sleep {mark(7301)}; done"
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.build, steps)
            await host.wait_for_log("ready")
            assert processes_named(mark(7300))
            scope.cancel()
    assert processes_named(mark(7300)) == processes_named(mark(7301)) == []
    host.assert_nothing_left()


HOSTILE = f"""
(setsid sh -c 'trap "" TERM HUP INT; sleep {mark(7400)}' &)
ln -s /etc/shadow shadow; ln -s / root; ln -s ../../../.. up
mkdir -p locked/in/deeper; echo x > locked/in/deeper/file; chmod 000 locked/in/deeper locked/in locked
mkfifo fifo
for place in / /etc /usr /usr/bin /var /root /proc/sys /sys; do touch $place/hostile 2>/dev/null && echo "wrote to $place"; done
echo hostile > /tmp/hostile; echo hostile > /dev/shm/hostile
cp /bin/sh ./suid; chmod 4755 suid
rm -rf /build/* /etc/passwd /bin/sh 2>/dev/null
kill -9 -1
"""


async def test_a_hostile_build(host: Host) -> None:
    before = tree(host.root)
    report = await host.build(HOSTILE, outputs=("shadow", "root/etc/passwd", "up/*"))
    assert report.exit_status != 0
    assert "wrote to" not in host.log
    assert processes_named(mark(7400)) == []
    assert tree(host.root) == before
    host.assert_nothing_left()


async def test_processes_without_end(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_most", lambda root: iter([100]))
    many = f"for n in $(seq 300); do sleep {mark(7500)} & done; echo all of them"
    await host.build(many)
    assert "all of them" not in host.log
    assert "fork" in host.log
    host.assert_nothing_left()


async def test_links_to_the_host_stay_links(host: Host, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    await host.build(f"ln -s {secret} s; ln -s /etc/shadow t", outputs=("s", "t"))
    with tarfile.open(host.outputs) as tar:
        assert {(member.name, member.type) for member in tar} == {("s", tarfile.SYMTYPE), ("t", tarfile.SYMTYPE)}


async def test_a_service_that_is_killed_takes_its_build_along(host: Host) -> None:
    async def kill() -> None:
        await host.wait_for_log("ready")
        (pid,) = _services(host.state)
        os.kill(pid, signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(SshError, match="ended early"):
            await host.build(f"(setsid sleep {mark(7500)} &); echo ready; sleep {mark(7501)}")
    wait_until_gone(mark(7500))
    wait_until_gone(mark(7501))
    assert [path.name for path in host.state.iterdir()] == ["b1"]
    # What it left goes with the next build.
    await host.build("true", build="b2")
    host.assert_nothing_left()


def _services(state: Path) -> list[int]:
    """The fronts of the services that work in `state`: those that have no parent among them."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if str(state).encode() in words and any(word.endswith(b"/build-service") for word in words):
            found[int(path.name)] = parent
    return [pid for pid, parent in found.items() if parent not in found]


async def test_a_stuck_build(host: Host) -> None:
    service = LocalService(host.state, stuck_timeout_s=1.5)
    with pytest.raises(EmulatorFault, match=r"the emulator hangs: no output and no processor time for") as caught:
        await host.build(f"echo ready; sleep {mark(7600)}", service=service)
    assert caught.value.exit_status == 1
    assert processes_named(mark(7600)) == []
    host.assert_nothing_left()


@pytest.mark.parametrize(
    "step",
    [
        "end=$(($(date +%s) + 4)); while [ $(date +%s) -lt $end ]; do :; done",
        "for i in 1 2 3 4 5 6 7; do sleep 0.5; echo $i; done",
    ],
)
async def test_a_build_that_is_silent_or_waits_is_not_stuck(host: Host, step: str) -> None:
    report = await host.build(step, service=LocalService(host.state, stuck_timeout_s=1.5))
    assert report.exit_status == 0


async def test_a_host_without_bubblewrap(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BWRAP", Path("/nonexistent/bwrap"))
    with pytest.raises(HostError, match="bwrap: not installed") as caught:
        await host.build("true")
    assert "apt-get install bubblewrap" in caught.value.hint


async def test_the_start_costs_little(host: Host) -> None:
    """Some 60 ms on an idle machine; here only what no machine may exceed."""
    times = []
    for number in range(5):
        began = time.monotonic()
        await host.build("true", build=f"b{number}")
        times.append(time.monotonic() - began)
    assert min(times) < 2


async def test_the_place(host: Host) -> None:
    async with open_local_place(host.root, host.state, stuck_timeout_s=100) as place:
        assert (place.environment, place.set_clock) == (str(host.root), False)
        assert abs(place.clock() - time.time()) < 5


# Unpacked environments


async def test_a_root_in_use_stays(tmp_path: Path, environment: Environment) -> None:
    roots = RootStore(tmp_path / "roots")
    phases: list[str] = []
    async with roots.open(environment, lambda text, _: phases.append(text)) as root:
        assert phases == ["unpacking the environment"]
        assert roots.digests() == {environment.digest}
        assert root.parent.parent.stat().st_mode & 0o777 == 0o700
        # Another process would see the same: the lock is a file's.
        other = RootStore(tmp_path / "roots")
        with pytest.raises(NotAllowedError, match="in use"):
            await other.remove(environment.digest)
        assert await other.gc(set()) == []
        async with other.open(environment) as same:
            assert same == root
    with roots.hold(environment.digest) as held:
        assert held == root
        with pytest.raises(NotAllowedError):
            await roots.remove(environment.digest)
    assert await roots.remove(environment.digest)
    assert not root.exists()
    with roots.hold(environment.digest) as held:
        assert held is None


async def test_the_root_of_an_environment_that_was_made_again(tmp_path: Path, environment: Environment) -> None:
    """The digest is the recipe's; what is unpacked must be the disk that VMs get."""
    roots = RootStore(tmp_path / "roots")
    root = await roots.ensure(environment)
    facts = root.parent / "root.json"
    before = facts.stat().st_ino
    assert await roots.ensure(environment) == root
    assert facts.stat().st_ino == before
    for wrong in ({"sparse_sha256": "another's"}, {"boot": "an earlier one"}):
        facts.write_text(json.dumps(json.loads(facts.read_text()) | wrong))
        (root / "old").touch()
        assert await roots.ensure(environment) == root
        assert not (root / "old").exists()
    assert await roots.gc({environment.digest}) == []
    assert await roots.gc(set()) == [environment.digest]


async def test_an_environment_goes_with_its_root(tmp_path: Path, environment: Environment) -> None:
    folder = tmp_path / "environments" / environment.digest
    folder.mkdir(parents=True)
    for path in environment.path.parent.iterdir():
        shutil.copy(path, folder)
    store = EnvironmentStore(tmp_path / "environments")
    async with store.open(environment.recipe) as found:
        root = await store.roots.ensure(found)
        assert root == tmp_path / "roots" / environment.digest / "root"
        with pytest.raises(NotAllowedError):
            await store.remove(found.digest)
    async with store.roots.open(found):
        with pytest.raises(NotAllowedError):
            await store.remove(found.digest)
        assert await store.gc(set()) == []
        assert store.digests() == {found.digest}
    assert await store.gc(set()) == [found.digest]
    assert store.roots.digests() == store.digests() == frozenset()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user sees its own subordinate ids")
async def test_the_root_is_what_a_vm_sees(host: Host, environment: Environment) -> None:
    argv = ["unsquashfs", "-lln", "-UTC", str(environment.path)]
    lines = await trio.run_process(argv, capture_stdout=True)
    checked = 0
    for line in lines.stdout.decode().splitlines():
        kind, owner, *rest = line.split(None, 5)
        if len(rest) < 4 or not rest[3].startswith("squashfs-root"):
            continue
        size, date, moment, name = rest
        path = host.root / name.removeprefix("squashfs-root").lstrip("/").partition(" -> ")[0]
        about = path.lstat()
        assert f"{about.st_uid}/{about.st_gid}" == owner, path
        assert stat.filemode(about.st_mode) == kind, path
        assert time.strftime("%Y-%m-%d %H:%M", time.gmtime(about.st_mtime)) == f"{date} {moment}", path
        if kind[0] == "-":
            assert about.st_size == int(size), path
        checked += 1
    assert checked > 3000
