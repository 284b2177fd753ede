"""Remote machines, against a real sshd on loopback: as whoever runs the tests, and as an unprivileged user of the system."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from offloadd.bridge import Bridge, open_bridge
from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.daemon import probes
from offloadd.daemon.probes import Probes
from offloadd.errors import OffloadError, ProtocolError, SshError
from offloadd.guest.ssh import open_remote
from offloadd.model.machine import SshMachine
from offloadd.place import probe
from offloadd.place.place import Place
from offloadd.place.probe import exchange_file, far_side_program, probe_ssh
from offloadd.place.remote import open_remote_place

from .real_sshd import SSHD, find_sshd
from .test_ssh import end_children, free_port, wait_for

pytestmark = pytest.mark.skipif(SSHD is None, reason="openssh-server is not installed")
ROOT = os.geteuid() == 0
USERS = ["me", pytest.param("unprivileged", marks=pytest.mark.skipif(not ROOT, reason="only root can make a user"))]


@dataclass
class Remote:
    """An sshd, and a machine that declares it."""

    folder: Path
    home: Path
    machine: SshMachine
    process: subprocess.Popen[bytes]

    @property
    def builds(self) -> Path:
        return self.home / ".cache/offload/builds"

    def left(self) -> list[str]:
        """What is left where builds are kept."""
        return sorted(path.name for path in self.builds.glob("*")) if self.builds.exists() else []


def make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def start(folder: Path, user: str, home: Path, *settings: str) -> Remote:
    """An sshd that lets `user` in, with its own home directory."""
    for name in ("host", "client"):
        if not (folder / name).exists():
            make_key(folder / name)
    port = free_port()
    path = next((words.removeprefix("PATH=") for words in settings if words.startswith("PATH=")), "/usr/bin:/bin")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/client.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nLogLevel VERBOSE\nSetEnv HOME={home} PATH={path}\n"
        + "".join(f"{words}\n" for words in settings if not words.startswith("PATH="))
    )
    with (folder / "sshd.log").open("ab") as log:
        process = subprocess.Popen(
            [find_sshd(), "-D", "-e", "-f", folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=log
        )
    wait_for(port)
    machine = SshMachine(
        kind="ssh",
        name="tower",
        systems=("x86_64-linux",),
        host="127.0.0.1",
        port=port,
        user=user,
        host_key=(folder / "host.pub").read_text(),
        private_key=str(folder / "client"),
    )
    return Remote(folder, home, machine, process)


def stop(remote: Remote) -> None:
    end_children(remote.process.pid)
    remote.process.kill()
    remote.process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's: another user cannot go there.
    made = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def unprivileged() -> Iterator[str]:
    """A user of the system, made for these tests."""
    name = f"offload-{secrets.token_hex(3)}"
    # A password that nobody has: without any, sshd takes the account for a locked one.
    subprocess.run(["useradd", "--no-create-home", "--shell", "/bin/bash", "--password", "*", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["userdel", name], check=True)


@pytest.fixture(params=USERS)
def remote(request: pytest.FixtureRequest, folder: Path) -> Iterator[Remote]:
    me = pwd.getpwuid(os.geteuid()).pw_name
    user = me if request.param == "me" else request.getfixturevalue("unprivileged")
    home = folder / "home"
    home.mkdir()
    if user != me:
        shutil.chown(home, user, user)
    made = start(folder, user, home)
    yield made
    stop(made)


@pytest.fixture
def start_own(folder: Path) -> Iterator[Callable[..., Remote]]:
    """Start an sshd with further settings, for whoever runs the tests."""
    started: list[Remote] = []

    def start_one(*settings: str) -> Remote:
        started.append(start(folder, pwd.getpwuid(os.geteuid()).pw_name, folder, *settings))
        return started[-1]

    yield start_one
    for one in started:
        stop(one)


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    async with open_bridge() as opened:
        yield opened


def changed(machine: SshMachine, **values: object) -> SshMachine:
    return machine.model_copy(update=values)


class Listening:
    """Keeps what the build says."""

    def __init__(self) -> None:
        self.text = ""
        self.heard = trio.Event()

    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def collecting(self) -> None: ...

    def log(self, text: str) -> None:
        self.text += text
        self.heard.set()


def make_job(place: Place, folder: Path, *steps: str, outputs: tuple[str, ...] = ()) -> Job:
    (folder / "hello").write_text("hello\n")
    with tarfile.open(folder / "source.tar", "w") as tar:
        tar.add(folder / "hello", arcname="hello")
    return Job(
        build=secrets.token_hex(4),
        name="p-1",
        steps=steps,
        env={"GREETING": "good day"},
        outputs=outputs,
        source=folder / "source.tar",
        environment=place.environment,
        set_clock=None,
        expected_clock=place.clock,
        timeout_s=60,
        max_silent_s=60,
        keep_failed=False,
    )


async def test_a_probe_and_a_file_there_and_back(remote: Remote, bridge: Bridge) -> None:
    async with open_remote(bridge, remote.machine) as guest:
        found = await probe_ssh(guest, "tower")
        assert abs(found.clock_offset_s) < 2
        assert found.cores == len(os.sched_getaffinity(0))
        assert found.kernel == os.uname().release
        assert found.machine == os.uname().machine
        assert found.fault == ""
        disk = shutil.disk_usage(remote.home).free
        assert abs((found.disk_free or 0) - disk) < max(disk // 10, 1 << 30)
        assert await exchange_file(guest, "tower", 3_000_000) > 0
    assert remote.left() == []
    assert remote.builds.stat().st_mode & 0o777 == 0o700


async def test_a_build(remote: Remote, bridge: Bridge, tmp_path: Path) -> None:
    steps = ("id -u; hostname; echo $GREETING; ls ~ / /build", "mkdir out; tr a-z A-Z <hello >out/hello")
    listener = Listening()
    async with open_remote_place(remote.machine, bridge) as place:
        job = make_job(place, tmp_path, *steps, outputs=("out",))
        with open_outputs_receiver(tmp_path / "outputs.tar") as outputs:
            report = await place.run(job, outputs, listener)
    # It does not see whose home it is.
    assert listener.text.splitlines()[:3] == ["1000", "localhost", "good day"]
    assert str(remote.home) not in listener.text
    assert report.exit_status == 0
    assert abs(report.started["clock"] - time.time()) < 60
    with tarfile.open(tmp_path / "outputs.tar") as tar:
        file = tar.extractfile("out/hello")
        assert file is not None
        assert file.read() == b"HELLO\n"
    assert remote.left() == []


async def test_a_build_that_fails(remote: Remote, bridge: Bridge, tmp_path: Path) -> None:
    async with open_remote_place(remote.machine, bridge) as place:
        job = make_job(place, tmp_path, "exit 7")
        with open_outputs_receiver(tmp_path / "outputs.tar") as outputs:
            report = await place.run(job, outputs, Listening())
    assert (report.exit_status, report.failed_step) == (7, 1)
    assert remote.left() == []


def processes(mark: str) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (directory / "cmdline").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


async def wait_for_process(mark: str) -> None:
    """What a step has just started has the step's name for a moment."""
    while not processes(mark):
        await trio.sleep(0.02)


async def wait_until_nothing_is_left(remote: Remote, mark: str) -> None:
    with trio.move_on_after(20):
        while remote.left() or processes(mark):
            await trio.sleep(0.05)
    assert remote.left() == []
    assert processes(mark) == []


async def run_for_long(remote: Remote, bridge: Bridge, folder: Path, mark: str, listener: Listening) -> None:
    async with open_remote_place(remote.machine, bridge) as place:
        step = f"(setsid sleep {mark} &) ; echo begun; sleep {mark}"
        with open_outputs_receiver(folder / "outputs.tar") as outputs:
            await place.run(make_job(place, folder, step), outputs, listener)


async def test_nothing_is_left_of_a_build_that_was_cancelled(remote: Remote, bridge: Bridge, tmp_path: Path) -> None:
    mark, listener = f"9000.{secrets.randbelow(1 << 30)}", Listening()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_for_long, remote, bridge, tmp_path, mark, listener)
        with trio.fail_after(30):
            await listener.heard.wait()
            await wait_for_process(mark)
        assert len(remote.left()) == 1
        nursery.cancel_scope.cancel()
    await wait_until_nothing_is_left(remote, mark)


async def test_nothing_is_left_when_the_connection_breaks(remote: Remote, bridge: Bridge, tmp_path: Path) -> None:
    mark, listener = f"9000.{secrets.randbelow(1 << 30)}", Listening()
    caught: list[OffloadError] = []

    async def run() -> None:
        try:
            await run_for_long(remote, bridge, tmp_path, mark, listener)
        except OffloadError as exc:
            caught.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with trio.fail_after(30):
            await listener.heard.wait()
            await wait_for_process(mark)
        kill_sessions(remote.process.pid)
    assert isinstance(caught[0], SshError)
    assert caught[0].retryable
    await wait_until_nothing_is_left(remote, mark)


def kill_sessions(sshd: int) -> None:
    """End the connections, not what runs in them: that is the build service's own part."""
    pids = subprocess.run(["pgrep", "-x", "sshd|sshd-session"], capture_output=True, text=True, check=False).stdout.split()
    # All are found before the first is killed: then its children have another parent.
    for pid in [pid for pid in map(int, pids) if pid != sshd and is_below(pid, sshd)]:
        os.kill(pid, signal.SIGKILL)


def is_below(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        with suppress(OSError):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            continue
        return False
    return pid == ancestor


async def test_another_host_key(start_own: Callable[..., Remote], bridge: Bridge, tmp_path: Path) -> None:
    machine = start_own().machine
    other = make_key(tmp_path / "other").with_suffix(".pub").read_text()
    with trio.fail_after(20), pytest.raises(SshError, match="another host key") as caught:
        async with open_remote(bridge, changed(machine, host_key=other)):
            pytest.fail("it was believed")
    assert "ssh-keyscan" in caught.value.hint


async def test_a_host_without_a_key_of_that_kind(start_own: Callable[..., Remote], bridge: Bridge, tmp_path: Path) -> None:
    machine = start_own().machine
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", tmp_path / "other"], check=True)
    with trio.fail_after(20), pytest.raises(SshError) as caught:
        async with open_remote(bridge, changed(machine, host_key=(tmp_path / "other.pub").read_text())):
            pytest.fail("it was believed")
    assert "ecdsa" in caught.value.hint


async def test_a_key_that_is_refused(start_own: Callable[..., Remote], bridge: Bridge, tmp_path: Path) -> None:
    machine = start_own().machine
    other = make_key(tmp_path / "other")
    with trio.fail_after(20), pytest.raises(SshError, match="refuses our key for the user") as caught:
        async with open_remote(bridge, changed(machine, private_key=str(other))):
            pytest.fail("it was let in")
    assert "authorized_keys" in caught.value.hint


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
async def test_a_key_that_others_can_read(mode: int, start_own: Callable[..., Remote], bridge: Bridge) -> None:
    machine = start_own().machine
    Path(machine.private_key).chmod(mode)
    with trio.fail_after(20), pytest.raises(SshError, match="can be used by other users") as caught:
        async with open_remote(bridge, machine):
            pytest.fail("it was used")
    assert caught.value.hint.endswith(f"chmod 600 {machine.private_key}")


async def test_keys_that_are_none(start_own: Callable[..., Remote], bridge: Bridge, tmp_path: Path) -> None:
    machine = start_own().machine
    locked, wrong, fifo = (tmp_path / name for name in ("locked", "wrong", "fifo"))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "a passphrase", "-f", locked], check=True)
    wrong.write_text("not a key")
    wrong.chmod(0o600)
    os.mkfifo(fifo, 0o600)
    for path, words in (
        (locked, "no private key without a passphrase"),
        (wrong, "no private key without a passphrase"),
        (fifo, "is not a file"),
        (tmp_path / "missing", "cannot be read"),
        (tmp_path, "is not a file"),
    ):
        with trio.fail_after(20), pytest.raises(SshError, match=words):
            async with open_remote(bridge, changed(machine, private_key=str(path))):
                pytest.fail("it was used")


async def test_nobody_listens(start_own: Callable[..., Remote], bridge: Bridge) -> None:
    machine = changed(start_own().machine, port=free_port())
    with trio.fail_after(20), pytest.raises(SshError, match=r"does not answer at 127\.0\.0\.1") as caught:
        async with open_remote(bridge, machine):
            pass
    assert "refused" in caught.value.what.lower()


async def test_a_name_that_nobody_has(start_own: Callable[..., Remote], bridge: Bridge) -> None:
    machine = changed(start_own().machine, host="no-such-host.invalid")
    with trio.fail_after(40), pytest.raises(SshError, match="does not answer at no-such-host"):
        async with open_remote(bridge, machine):
            pass


async def silent_host(nursery: trio.Nursery, calls: list[int]) -> int:
    """A port that takes connections and says nothing."""

    async def hold(stream: trio.SocketStream) -> None:
        calls.append(1)
        await trio.sleep_forever()

    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, hold, 0, host="127.0.0.1"))
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def test_a_silent_host_is_asked_once_and_not_for_long(
    start_own: Callable[..., Remote], bridge: Bridge, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(probes, "LIMIT_S", 0.5)
    calls: list[int] = []
    machine = changed(start_own().machine, port=await silent_host(nursery, calls))
    asked, answers = Probes(bridge, lambda name, error: None), []

    async def ask() -> None:
        answers.append(await asked.ask(machine))

    with trio.fail_after(5):
        async with trio.open_nursery() as asking:
            for _ in range(3):
                asking.start_soon(ask)
    assert len(calls) == 1
    assert len(answers) == 3
    assert all(isinstance(answer, SshError) and "does not answer within" in answer.what for answer in answers)
    # Another address is another host; and who wants to know again can.
    assert asked.known(changed(machine, port=1)) is None
    asked.forget("tower")
    assert asked.known(machine) is None


async def test_a_host_without_python(start_own: Callable[..., Remote], bridge: Bridge) -> None:
    remote = start_own("PATH=/nonexistent")
    with trio.fail_after(20), pytest.raises(SshError, match="has no python3") as caught:
        async with open_remote_place(remote.machine, bridge):
            pass
    assert "bubblewrap" in caught.value.hint


async def test_a_host_with_an_old_python(start_own: Callable[..., Remote], bridge: Bridge, folder: Path) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/python3").write_text("#!/bin/sh\necho Python 3.6 >&2\nexit 1\n")
    (folder / "bin/python3").chmod(0o755)
    remote = start_own(f"PATH={folder}/bin")
    with trio.fail_after(20), pytest.raises(SshError, match=r"has Python 3\.6, too old"):
        async with open_remote_place(remote.machine, bridge):
            pass


async def test_a_host_without_bubblewrap(
    start_own: Callable[..., Remote], bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = far_side_program().replace(b'"/usr/bin/bwrap"', b'"/nonexistent"')
    assert program != far_side_program()
    monkeypatch.setattr(probe, "far_side_program", lambda: program)
    with trio.fail_after(20), pytest.raises(SshError, match="bubblewrap is not installed"):
        async with open_remote_place(start_own().machine, bridge):
            pass


async def test_a_host_whose_home_cannot_be_written(start_own: Callable[..., Remote], bridge: Bridge, folder: Path) -> None:
    (folder / ".cache").write_text("in the way")
    async with open_remote(bridge, start_own().machine) as guest:
        with trio.fail_after(20), pytest.raises(SshError, match="a program failed there") as caught:
            await exchange_file(guest, "tower")
    assert "Traceback" not in caught.value.detail
    assert str(folder / ".cache") in caught.value.what


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("yes", "more than 64 KiB"),
        ("echo hello", "not JSON"),
        ("echo []", "no JSON object"),
        ('echo welcome; eval "$SSH_ORIGINAL_COMMAND"', "not JSON"),
        ("exec sleep 1000", "no answer within"),
        ("exec >&-; exec 2>&-; exec sleep 1000", "no answer within"),
        ("head -c 100000000 /dev/zero >&2", "no answer within"),
    ],
)
async def test_a_hostile_host(
    command: str, words: str, start_own: Callable[..., Remote], bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_S", 3.0)
    remote = start_own(f"ForceCommand {command}")
    with trio.fail_after(20), pytest.raises((ProtocolError, SshError), match=words):
        async with open_remote_place(remote.machine, bridge):
            pass


async def test_a_host_that_gives_back_another_file(start_own: Callable[..., Remote], bridge: Bridge) -> None:
    async with open_remote(bridge, start_own("ForceCommand head -c 300000 /dev/zero").machine) as guest:
        with trio.fail_after(20), pytest.raises(ProtocolError, match="another file than was sent"):
            await exchange_file(guest, "tower")
