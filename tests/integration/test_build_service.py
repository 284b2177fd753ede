"""The real build service of the guest, run here as root: real namespaces, mounts and bubblewrap, no machine around it."""

from __future__ import annotations

import io
import json
import os
import selectors
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offloadd.builder.outputs import open_outputs_receiver, unpack_outputs
from offloadd.builder.source import pack_source
from offloadd.guest.frames import Decoder, Frame, encode

PROGRAM = Path(__file__).parents[2] / "images/guest/build-service"
LIMIT_S = 30.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the build service mounts and makes namespaces: it must be root")


class Session:
    """A running build service, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], state: Path) -> None:
        self.process = process
        self.state = state
        self.frames: list[Frame] = []
        self._decoder = Decoder()
        self._selector = selectors.DefaultSelector()
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ)

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(encode(kind, payload))
        self.process.stdin.flush()

    def begin(self, **fields: Any) -> None:
        """Send the begin frame alone, for a source that comes in another way."""
        self.send(b"B", json.dumps(begin(**fields)).encode())

    def send_build(self, source: bytes = b"", **fields: Any) -> None:
        self.begin(**fields)
        for at in range(0, len(source), 65536):
            self.send(b"S", source[at : at + 65536])
        self.send(b"s")

    def read(self, until: Callable[[], bool]) -> None:
        """Take frames until `until()`; fails when that takes too long."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + LIMIT_S
        while not until():
            assert self._selector.select(deadline - time.monotonic()), f"not reached; so far: {self.frames}"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, f"ended early: {self.frames}"
            self.frames += self._decoder.feed(data)

    def read_all(self) -> None:
        self.read_to_last()
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(LIMIT_S) == 0
        assert list(self.state.iterdir()) == []

    def read_to_last(self) -> None:
        self.read(lambda: self.frames[-1:] == [Frame(b"D")])

    def read_log(self, text: bytes) -> None:
        self.read(lambda: text in self.log)

    def cancel(self) -> None:
        """Close standard input and see that everything goes away."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(LIMIT_S) == 1
        assert list(self.state.iterdir()) == []

    @property
    def log(self) -> bytes:
        return b"".join(frame.payload for frame in self.frames if frame.kind == b"L")

    @property
    def tar(self) -> bytes:
        return b"".join(frame.payload for frame in self.frames if frame.kind == b"O")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for frame in self.frames if frame.kind == b"E" and (event := frame.json())["event"] == name]

    @property
    def error(self) -> str:
        (event,) = self.events("error")
        return str(event["what"])


def begin(**fields: Any) -> dict[str, Any]:
    return {
        "protocol": 3,
        "build": "b1",
        "environment": None,
        "source": None,
        "scratch": None,
        "personality": None,
        "network": False,
        "date": None,
        "directory": "/build/hello-1",
        "steps": ["true"],
        "env": {},
        "outputs": [],
        "keep_failed": False,
        **fields,
    }


def tar_of(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(text), 1_500_000_000
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


EMPTY = tar_of({})


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "builds"
    state.mkdir()
    # Builds run as another user, who must be able to pass.
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    return state


@contextmanager
def serve(state: Path, *options: str, wrapper: tuple[str, ...] = ()) -> Iterator[Session]:
    command = [*wrapper, str(PROGRAM), "--state", str(state), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Session(process, state)
        finally:
            process.kill()


@pytest.fixture
def service(state: Path) -> Iterator[Session]:
    with serve(state) as session:
        yield session


def exits(session: Session) -> list[tuple[int, int]]:
    return [(event["status"], event["step"]) for event in session.events("exit")]


def processes_named(mark: str) -> list[str]:
    """The processes that have `mark` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if mark in command:
            found.append(command)
    return found


def wait_until_gone(mark: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while processes_named(mark):
        assert time.monotonic() < deadline, processes_named(mark)
        time.sleep(0.02)


def mark(seconds: int) -> str:
    """A sleep that no other process on this machine does."""
    return f"{seconds}.{os.getpid()}"


def unpack(session: Session, tmp_path: Path) -> Path:
    with open_outputs_receiver(tmp_path / "outputs.tar") as receiver:
        receiver.write(session.tar)
        receiver.finish()
    unpack_outputs(tmp_path / "outputs.tar", tmp_path / "out")
    return tmp_path / "out"


# What a build is given


def test_a_build_from_source_to_outputs(service: Session, tmp_path: Path) -> None:
    steps = ["tr a-z A-Z < a.txt > b.txt; mkdir -p dist/deep; cp b.txt dist/deep", "ln -s b.txt link; chmod 700 b.txt"]
    service.send_build(tar_of({"a.txt": "hello"}), steps=steps, outputs=["*.txt", "dist", "link", "nothing-*"])
    service.read_all()
    assert [event["command"] for event in service.events("step")] == steps
    assert [(event["index"], event["count"]) for event in service.events("step")] == [(1, 2), (2, 2)]
    assert exits(service) == [(0, 2)]
    assert service.events("outputs") == [{"event": "outputs", "missing": ["nothing-*"]}]
    out = unpack(service, tmp_path)
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == {
        *("a.txt", "b.txt", "link", "dist", "dist/deep", "dist/deep/b.txt"),
    }
    assert (out / "dist/deep/b.txt").read_text() == "HELLO"
    assert (out / "link").readlink() == Path("b.txt")
    assert (out / "b.txt").stat().st_mode & 0o777 == 0o700
    assert (out / "a.txt").stat().st_mtime == 1_500_000_000


def test_the_start_is_told_with_clock_cpu_and_kernel(service: Session) -> None:
    service.send_build(EMPTY)
    service.read_all()
    (started,) = service.events("started")
    assert abs(started["clock"] - time.time()) < LIMIT_S
    assert started["kernel"] == os.uname().release
    assert f": {started['cpu']}\n" in Path("/proc/cpuinfo").read_text()
    kinds = [frame.json()["event"] for frame in service.frames if frame.kind == b"E"]
    assert kinds == ["started", "step", "exit", "outputs"]


def test_the_sandbox(service: Session) -> None:
    step = "id -u; id -g; pwd; env | sort; grep -c : /proc/net/dev; test ! -e /sys/class; read x || echo no-input"
    service.send_build(EMPTY, steps=[step], env={"LD_LIBRARY_PATH": "/x", "LANG": "C"})
    service.read_all()
    lines = service.log.decode().splitlines()
    assert lines[:3] == ["1000", "1000", "/build/hello-1"]
    env = dict(line.split("=", 1) for line in lines if "=" in line)
    env.pop("_", None)
    assert env == {
        "HOME": "/build",
        "LANG": "C",
        "LD_LIBRARY_PATH": "/x",
        "LOGNAME": "build",
        "OFFLOAD_BUILD": "b1",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PWD": "/build/hello-1",
        "TERM": "dumb",
        "USER": "build",
    }
    assert lines[-2:] == ["1", "no-input"]


def test_the_loopback_device_works(service: Session) -> None:
    connect = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()); print('up')"
    )
    service.send_build(EMPTY, steps=[f'/usr/bin/python3 -c "{connect}"'])
    service.read_all()
    assert service.log == b"up\n"


def test_a_broken_pipe_ends_a_step_s_program_as_in_any_shell(service: Session) -> None:
    service.send_build(EMPTY, steps=["yes | head -n 1"])
    service.read_all()
    assert service.log == b"y\n"


def test_the_source_keeps_modes_links_and_times(service: Session, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "locked").mkdir(parents=True)
    (tree / "locked/in").write_text("x")
    os.link(tree / "locked/in", tree / "hard")
    (tree / ("long-" * 40)).write_text("long")
    (tree / "soft").symlink_to("locked/in")
    (tree / "hard").chmod(0o751)
    os.utime(tree / "hard", (1e9, 1e9))
    (tree / "locked").chmod(0o555)
    source = b"".join(pack_source(tree, newest=1_577_836_800))
    step = "stat -c '%n %a %Y %u %h' hard locked locked/in; readlink soft; cat long-*; date +%Y -r soft; stat -c %Y long-*"
    service.send_build(source, steps=[step])
    service.read_all()
    assert service.log.decode().splitlines() == [
        "hard 751 1000000000 1000 2",
        "locked 555 1577836800 1000 2",
        "locked/in 751 1000000000 1000 2",
        "locked/in",
        "long2001",
        "1577836800",
    ]


# Logs


def test_log_lines_come_while_the_step_runs(service: Session) -> None:
    service.send_build(EMPTY, steps=[f"echo one; echo two >&2; sleep {mark(1000)}"])
    service.read_log(b"one\ntwo\n")
    assert service.events("exit") == []
    service.cancel()
    wait_until_gone(mark(1000))


def test_a_step_that_closes_its_output_is_still_waited_for(service: Session) -> None:
    service.send_build(EMPTY, steps=["exec >/dev/null 2>&1; sleep 0.3; echo late > file"], outputs=["file"])
    service.read_all()
    assert service.events("outputs") == [{"event": "outputs", "missing": []}]


def test_many_steps(service: Session) -> None:
    """bubblewrap must find its processes in /proc whatever their numbers are."""
    service.send_build(EMPTY, steps=[f"echo {number}" for number in range(40)])
    service.read_all()
    assert service.log.split() == [b"%d" % number for number in range(40)]


def test_a_lot_of_log(service: Session) -> None:
    service.send_build(EMPTY, steps=["head -c 50000000 /dev/zero"])
    service.read_all()
    assert len(service.log) == 50_000_000


# What a step leaves behind


def test_background_processes_end_with_their_step(service: Session) -> None:
    step = f"setsid sleep {mark(2000)} & setsid yes & sleep 0.1; echo started"
    service.send_build(EMPTY, steps=[step, f"echo between; sleep {mark(2001)}"])
    service.read_log(b"between\n")
    assert processes_named(mark(2001))
    assert processes_named(mark(2000)) == []
    service.cancel()


@pytest.mark.parametrize(
    ("steps", "status", "failed"),
    [
        (["true", "exit 7", "echo never"], 7, 2),
        (["false; echo never"], 1, 1),
        (["kill -9 $$"], 137, 1),
        (["no-such-program"], 127, 1),
    ],
)
def test_the_first_step_that_fails_ends_the_build(service: Session, steps: list[str], status: int, failed: int) -> None:
    service.send_build(EMPTY, steps=steps, outputs=["*"])
    service.read_all()
    assert exits(service) == [(status, failed)]
    assert b"never" not in service.log
    assert service.tar == b""


def test_a_failed_build_is_kept_when_asked_for(service: Session, tmp_path: Path) -> None:
    service.send_build(tar_of({"a": "1"}), steps=["mkdir d; echo 2 > d/b; false"], outputs=["x"], keep_failed=True)
    service.read_all()
    out = unpack(service, tmp_path)
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == {"a", "d", "d/b"}


# Cancelled


def test_cancelled_before_anything_was_said(service: Session) -> None:
    service.cancel()


def test_cancelled_in_the_middle_of_a_frame(service: Session) -> None:
    assert service.process.stdin is not None
    service.process.stdin.write(b"B\0\0")
    service.process.stdin.flush()
    service.cancel()


def test_cancelled_while_it_waits_for_its_disk(service: Session) -> None:
    service.send_build(EMPTY, environment="env-none")
    wait_for_worker(service)
    began = time.monotonic()
    service.cancel()
    assert time.monotonic() - began < 5


def test_cancelled_while_it_takes_the_source(service: Session) -> None:
    service.send(b"B", json.dumps(begin()).encode())
    source = tar_of({"big": "x" * 1_000_000})
    service.send(b"S", source[:300_000])
    wait_for_worker(service)
    service.cancel()


def test_cancelled_in_a_step_that_resists(service: Session) -> None:
    step = f"trap '' TERM HUP INT; (setsid sleep {mark(3000)} &); echo ready; while :; do sleep {mark(3001)}; done"
    service.send_build(EMPTY, steps=[step])
    service.read_log(b"ready")
    service.cancel()
    wait_until_gone(mark(3000))
    wait_until_gone(mark(3001))


def test_cancelled_while_nobody_takes_its_log(service: Session) -> None:
    service.send_build(EMPTY, steps=["yes"])
    service.read_log(b"y")
    service.cancel()


def test_cancelled_while_it_sends_outputs(service: Session) -> None:
    service.send_build(EMPTY, steps=["truncate -s 100G huge"], outputs=["huge"])
    service.read(lambda: len(service.tar) > 1_000_000)
    service.cancel()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_cancels(service: Session, number: signal.Signals) -> None:
    service.send_build(EMPTY, steps=[f"echo ready; sleep {mark(4000)}"])
    service.read_log(b"ready")
    service.process.send_signal(number)
    assert service.process.wait(LIMIT_S) == 1
    assert list(service.state.iterdir()) == []
    wait_until_gone(mark(4000))


def test_what_a_killed_service_left_is_removed_by_the_next(state: Path) -> None:
    with serve(state) as first:
        first.send_build(EMPTY, build="first", steps=[f"echo ready; sleep {mark(5000)}"])
        first.read_log(b"ready")
        first.process.kill()
        first.process.wait()
    wait_until_gone(mark(5000))
    assert [path.name for path in state.iterdir()] == ["first"]
    with serve(state) as second:
        second.send_build(EMPTY, build="second")
        second.read_all()


def test_two_builds_side_by_side(state: Path) -> None:
    with serve(state) as first, serve(state) as second, serve(state) as third:
        first.send_build(EMPTY, build="first", steps=[f"echo ready; sleep {mark(6000)}"])
        first.read_log(b"ready")
        second.send_build(EMPTY, build="first")
        second.read_to_last()
        assert second.error == "build first is running already"
        third.send_build(EMPTY, build="third", steps=["echo done"])
        third.read_to_last()
        assert third.log == b"done\n"
        assert processes_named(mark(6000))
        first.cancel()


def wait_for_worker(service: Session) -> None:
    """Wait until the service has made the build's directory and started the process that works in it."""
    deadline = time.monotonic() + LIMIT_S
    while not any(service.state.iterdir()) or len(processes_named(str(service.state))) < 2:
        assert time.monotonic() < deadline, "the build did not begin"
        time.sleep(0.01)


# Hostile builds


def test_links_in_outputs_are_sent_and_never_followed(service: Session, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    steps = [
        f"ln -s /etc/shadow shadow; ln -s /etc dir; ln -s {secret} secret; ln -s / root; ln -s ../.. up; mkfifo fifo; echo > x"
    ]
    outputs = ["shadow", "dir/passwd", "dir/*", "secret", "root/**", "up/*", "fifo", "x"]
    service.send_build(EMPTY, steps=steps, outputs=outputs)
    service.read_all()
    assert service.events("outputs")[0]["missing"] == ["dir/passwd", "dir/*", "root/**", "up/*"]
    with tarfile.open(fileobj=io.BytesIO(service.tar)) as tar:
        assert {(member.name, member.type, member.linkname) for member in tar} == {
            ("shadow", tarfile.SYMTYPE, "/etc/shadow"),
            ("secret", tarfile.SYMTYPE, str(secret)),
            ("x", tarfile.REGTYPE, ""),
        }


def test_a_build_directory_that_became_a_link_is_not_read(service: Session) -> None:
    service.send_build(EMPTY, steps=["cd /build && rmdir hello-1 && ln -s /etc hello-1"], outputs=["shadow", "gshadow"])
    service.read_all()
    assert service.tar.count(b"root:") == 0


def test_outputs_that_the_user_cannot_read_are_reported(service: Session) -> None:
    service.send_build(EMPTY, steps=["echo x > file; chmod 0 file"], outputs=["file"])
    service.read_all()
    assert service.error == "file: Permission denied"


def test_a_very_deep_tree_is_removed(service: Session) -> None:
    deep = "import os\\nfor i in range(3000): os.mkdir('d' * 50); os.chdir('d' * 50)"
    service.send_build(EMPTY, steps=[f'printf "{deep}" > deep.py; /usr/bin/python3 deep.py'])
    service.read_all()
    assert service.events("exit")[0]["status"] == 0


def test_a_very_deep_tree_as_output_is_an_error(service: Session) -> None:
    deep = "import os\\nfor i in range(3000): os.mkdir('d'); os.chdir('d')"
    service.send_build(EMPTY, steps=[f'printf "{deep}" > deep.py; /usr/bin/python3 deep.py'], outputs=["**"])
    service.read_all()
    assert "File name too long" in service.error


def test_names_that_are_no_text(service: Session, tmp_path: Path) -> None:
    service.send_build(EMPTY, steps=["mkdir o; touch \"$(printf 'o/\\377\\n')\" \"o/$(printf '%0200d' 1)\""], outputs=["o"])
    service.read_all()
    names = {os.fsencode(path.name) for path in (unpack(service, tmp_path) / "o").iterdir()}
    assert names == {b"\xff", b"%0200d" % 1}


# What the service cannot do


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"protocol": 1}, "protocol 1 is asked for, this build service speaks 3"),
        ({"build": "../b"}, "'../b' is not the name of a build"),
        ({"directory": "/build/../etc"}, "'/build/../etc' is not a directory to build in"),
        ({"outputs": ["../x"]}, "output '../x' leaves the build directory"),
        ({"steps": [1]}, "steps, outputs and env of the begin frame must be texts"),
        ({"date": "2020"}, "field date of the begin frame is of the wrong type"),
        ({"surplus": 1}, "the begin frame must have the fields"),
    ],
)
def test_a_wrong_begin_frame(service: Session, fields: dict[str, Any], what: str) -> None:
    service.send(b"B", json.dumps(begin(**fields)).encode())
    service.read_all()
    assert service.error.startswith(what)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (b"x" * 1024, "the source is not a tar"),
        (b"", "the source's tar is cut off"),
        (tar_of({"../x": "1"}), "the source's tar has a member"),
        (tar_of({"/etc/x": "1"}), "the source's tar has a member"),
        (tar_of({"a": "1" * 600})[:700], "the source's tar is cut off"),
        (tar_of({"a": "1", "a/b": "2"}), "a/b: Not a directory"),
    ],
)
def test_a_wrong_source(service: Session, source: bytes, what: str) -> None:
    service.send_build(source)
    service.read_all()
    assert what in service.error
    assert service.events("started") == []


def test_a_service_that_may_not_set_the_clock_says_so(state: Path) -> None:
    """The clock of this machine is not for a test to change: without the capability the attempt shows."""
    with serve(state, wrapper=("setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time")) as service:
        service.send_build(EMPTY, date=1_577_836_800)
        service.read_all()
        assert service.error == "cannot set the clock: Operation not permitted"
        assert service.events("started") == []


def test_a_sandbox_that_cannot_be_made_is_no_failed_step(state: Path) -> None:
    broken = 'mount --bind /bin/false /usr/bin/bwrap && exec "$@"'
    with serve(state, wrapper=("unshare", "--mount", "sh", "-c", broken, "sh")) as service:
        service.send_build(EMPTY)
        service.read_all()
        assert service.error == "the sandbox for the step could not be made: the log's last lines say why"
        assert service.events("exit") == []


def test_an_error_can_be_read_by_a_host_that_is_still_sending(service: Session) -> None:
    service.send_build(tar_of({"../x": "1" * 5_000_000}))
    service.read_all()
    assert "the source's tar has a member" in service.error


def test_a_host_that_stays_does_not_keep_the_service(service: Session) -> None:
    service.send_build(EMPTY, build="..")
    service.read_to_last()
    assert service.process.wait(LIMIT_S) == 0


# An environment on a disk


def copy_program(program: str, root: Path) -> None:
    """Copy a program and the libraries that it loads."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for name in (program, *(word for word in listed.split() if word.startswith("/"))):
        place = root / name.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, place)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A small root file system on a loop device, and a /sys that gives it a serial: what a guest sees of a virtio disk."""
    if shutil.which("mksquashfs") is None or not Path("/dev/loop-control").exists():
        pytest.skip("needs mksquashfs and loop devices")
    root = tmp_path / "environment"
    for name in ("bin", "build", "etc", "tmp", "proc", "dev"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    os.chown(root / "build", 1000, 1000)
    for name in ("sh", "cat", "ls"):
        copy_program(f"/bin/{name}", root)
    (root / "etc/marker").write_text("from the environment\n")
    image = tmp_path / "root.squashfs"
    subprocess.run(["mksquashfs", root, image, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    loop = subprocess.run(["losetup", "--find", "--show", "--read-only", image], capture_output=True, text=True, check=False)
    if loop.returncode:
        pytest.skip(f"no loop device: {loop.stderr.strip()}")
    device = Path(loop.stdout.strip())
    serial = tmp_path / "sys/block" / device.name / "serial"
    serial.parent.mkdir(parents=True)
    serial.write_text("env-0123456789ab\n")
    yield tmp_path / "sys", "env-0123456789ab"
    subprocess.run(["losetup", "--detach", device], check=True)


def test_a_build_in_an_environment(state: Path, disk: tuple[Path, str]) -> None:
    sys_root, serial = disk
    step = "cat /etc/marker; echo changed > /build/here; ls /build; echo x > /etc/marker || echo kept; ls /"
    for _ in range(2):
        with serve(state, "--sys", str(sys_root)) as service:
            service.send_build(tar_of({"a": "1"}), environment=serial, steps=[step, "cat a /build/here"], outputs=["a"])
            service.read_all()
            assert service.events("error") == [], service.log
            assert exits(service) == [(0, 2)]
            lines = service.log.decode().splitlines()
            assert lines[:3] == ["from the environment", "hello-1", "here"]
            assert "kept" in lines
            assert lines[-1] == "1changed"
            assert "root" not in lines


def test_a_disk_that_never_comes(state: Path, tmp_path: Path) -> None:
    (tmp_path / "sys/block/vdz").mkdir(parents=True)
    (tmp_path / "sys/block/vdz/serial").write_text("another")
    with serve(state, "--sys", str(tmp_path / "sys")) as service:
        service.send_build(EMPTY, environment="env-missing")
        service.read_all()
        assert service.error == "no disk env-missing came within 10 s"


def test_a_disk_that_is_no_environment(state: Path, disk: tuple[Path, str], tmp_path: Path) -> None:
    sys_root, serial = disk
    image = tmp_path / "root.squashfs"
    image.write_bytes(bytes(image.stat().st_size))
    with serve(state, "--sys", str(sys_root)) as service:
        service.send_build(EMPTY, environment=serial)
        service.read_all()
        assert service.error.startswith("cannot mount squashfs on ")
