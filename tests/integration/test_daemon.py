"""The daemon over its real socket, without a guest."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import offloadd
from offloadd.client import Client
from offloadd.errors import (
    ConfigError,
    DaemonError,
    HostError,
    ImageError,
    NoMachineError,
    NotAllowedError,
    NotFoundError,
    UsageError,
)
from offloadd.model.asked import Asked, Changes, RecipeFile
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import BuildState, MachineState
from offloadd.paths import Paths
from offloadd.store.database import open_database
from offloadd.vm.record import InstanceRecord, write_record

from ..unit.plans import BOOT, plan
from ..unit.test_image_store import place_image


class Daemon:
    """One `offloadd` in directories of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = Paths(
            config=root / "c/offload", state=root / "s/offload", cache=root / "k/offload", runtime=root / "r/offload"
        )
        self.process: subprocess.Popen[str] | None = None

    @property
    def env(self) -> dict[str, str]:
        folders = {"CONFIG_HOME": "c", "STATE_HOME": "s", "CACHE_HOME": "k", "RUNTIME_DIR": "r"}
        # The client's daemon runs in another directory: what is tested is found there too.
        path = {"PYTHONPATH": str(Path(offloadd.__file__).parent.parent)}
        return os.environ | path | {f"XDG_{name}": str(self.root / folder) for name, folder in folders.items()}

    def spawn(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "offloadd.daemon.main", *arguments]
        return subprocess.Popen(command, env=self.env | env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def start(self, *arguments: str) -> Client:
        self.process = self.spawn(*arguments)
        client = Client(self.paths)
        deadline = time.monotonic() + 30
        while not client.answers():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return client

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, limit_s: float = 20) -> str:
        """Its standard error, after a clean end."""
        assert self.process is not None
        _, errors = self.process.communicate(timeout=limit_s)
        assert self.process.returncode == 0, errors
        assert "Traceback" not in errors
        return errors

    def machine(self, name: str, text: str = "") -> None:
        folder = self.paths.config / "machines"
        folder.mkdir(parents=True, exist_ok=True)
        # A QEMU that is none: nothing starts here.
        (folder / f"{name}.yaml").write_text(f"kind: build-vm\nimage: debian\nqemu: /bin/false\n{text}")


@pytest.fixture
def make_daemon() -> Iterator[Callable[[], Daemon]]:
    made: list[Daemon] = []

    def make() -> Daemon:
        # Directly below /tmp: a socket's path holds 107 bytes.
        made.append(Daemon(Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))))
        return made[-1]

    yield make
    for daemon in made:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.communicate()
        shutil.rmtree(daemon.root)


@pytest.fixture
def daemon(make_daemon: Callable[[], Daemon]) -> Daemon:
    return make_daemon()


def request(**fields: Any) -> BuildRequest:
    recipe = {"name": "r", "version": "1", "steps": ["true"], **fields.pop("recipe", {})}
    return BuildRequest.model_validate({"recipe": recipe, **fields})


def raw(daemon: Daemon) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.paths.socket)), base_url="http://offloadd", timeout=10)


def events(client: Client, build: str) -> list[dict[str, Any]]:
    return list(client.stream("GET", f"/v1/builds/{build}/events"))


def test_status(daemon: Daemon) -> None:
    with daemon.start() as client:
        status = client.get("/v1/status")
        assert daemon.process is not None
        assert status["pid"] == daemon.process.pid
        assert (status["machines"], status["builds"], status["idle_timeout_s"]) == (0, 0, 0)
        assert status["socket"] == str(daemon.paths.socket)
        names = [machine["name"] for machine in client.get("/v1/machines")]
        assert names == sorted(names)
        assert {"binfmt", "build-vm", "emulated-aarch64", "local"} <= set(names)
        assert client.get("/v1/builds") == []
    for path in (daemon.paths.state, daemon.paths.runtime, daemon.paths.instances, daemon.paths.builds):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(daemon.paths.socket.stat().st_mode) == 0o600


def test_sigterm_ends_it_cleanly(daemon: Daemon) -> None:
    with daemon.start():
        pass
    daemon.signal(signal.SIGTERM)
    assert "ended" in daemon.wait()
    assert not daemon.paths.socket.exists()
    with Client(daemon.paths) as client, pytest.raises(DaemonError, match="does not answer"):
        client.get("/v1/status")


def test_a_daemon_that_does_not_know_what_it_is_asked_for(daemon: Daemon) -> None:
    """As one that was started before an upgrade."""
    with daemon.start() as client, pytest.raises(UsageError, match="POST /v2/builds") as caught:
        client.post("/v2/builds")
    assert "offload daemon stop" in caught.value.hint


def test_a_request_to_stop_ends_it_cleanly(daemon: Daemon) -> None:
    with daemon.start() as client:
        client.post("/v1/stop")
    daemon.wait()
    assert not daemon.paths.socket.exists()


def test_it_ends_when_it_is_idle(daemon: Daemon) -> None:
    began = time.monotonic()
    with daemon.start("--idle-timeout", "1s") as client:
        while time.monotonic() < began + 2:
            client.get("/v1/status")
            time.sleep(0.1)
    assert "idle" in daemon.wait()
    assert time.monotonic() - began > 2.5


def test_a_second_daemon_is_refused(daemon: Daemon) -> None:
    with daemon.start() as client:
        second = daemon.spawn()
        _, errors = second.communicate(timeout=20)
        assert second.returncode == 6
        what = f"runs already for this user, with {daemon.paths.state}"
        assert errors == f"offloadd: offloadd: {what}\n  hint: offload daemon status\n"
        assert client.answers()


def test_a_second_daemon_with_the_same_socket_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    with daemon.start() as client:
        second = daemon.spawn(XDG_STATE_HOME=str(tmp_path))
        _, errors = second.communicate(timeout=20)
        assert second.returncode == 6
        assert f"runs already for this user, with {daemon.paths.runtime}" in errors
        assert client.answers()


@pytest.mark.parametrize(("module", "words"), [("offloadd.daemon.main", []), ("offload_cli.entry", ["vm", "list"])])
def test_without_a_home_directory(daemon: Daemon, module: str, words: list[str]) -> None:
    # As where the user has no entry: whoever has none may not be able to read this Python.
    code = f"import os, {module}; os.path.expanduser = lambda path: path; {module}.main()"
    env = {name: value for name, value in daemon.env.items() if not name.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 75, done.stderr
    assert f"user {os.getuid()}: has no home directory\n  hint: set HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_daemon_is_no_obstacle(daemon: Daemon) -> None:
    with daemon.start():
        pass
    daemon.signal(signal.SIGKILL)
    assert daemon.process is not None
    daemon.process.communicate()
    assert daemon.paths.socket.exists()
    with daemon.start() as client:
        assert client.get("/v1/builds") == []


@pytest.mark.parametrize("arguments", [["--idle-timeout", "soon"], ["--nothing"], ["word"]])
def test_wrong_usage(daemon: Daemon, arguments: list[str]) -> None:
    process = daemon.spawn(*arguments)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "usage: offloadd" in errors
    assert "Traceback" not in errors


def test_a_path_that_is_too_long_for_a_socket(make_daemon: Callable[[], Daemon]) -> None:
    daemon = make_daemon()
    daemon.root = daemon.root / ("x" * 100)
    try:
        process = daemon.spawn()
        _, errors = process.communicate(timeout=20)
    finally:
        daemon.root = daemon.root.parent
    assert process.returncode == 75
    assert "107 bytes" in errors
    assert "Traceback" not in errors


def test_a_damaged_database_is_told(daemon: Daemon) -> None:
    daemon.paths.state.mkdir(parents=True)
    daemon.paths.database.write_bytes(b"this is no database " * 1000)
    process = daemon.spawn()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert f"offloadd: {daemon.paths.database}: cannot be used" in errors
    assert "Traceback" not in errors


RECIPE = {"name": "r", "steps": ["true"]}


def test_wrong_requests(daemon: Daemon) -> None:
    with daemon.start(), raw(daemon) as http:
        bodies: tuple[Any, ...] = (
            {},
            {"recipe": {}},
            {"recipe": RECIPE, "surprise": 1},
            {"recipe": RECIPE | {"steps": []}},
            {"recipe": RECIPE | {"date": 2020}},
            {"recipe": RECIPE | {"version": 1.0}},
            {"recipe": RECIPE | {"version": "../.."}},
            {"recipe": RECIPE, "date": "1960-01-01"},
            {"recipe": RECIPE, "timeout": -1},
            {"recipe": RECIPE, "machine": "../m"},
            [],
            "text",
            None,
        )
        for body in bodies:
            answer = http.post("/v1/builds", json=body)
            assert answer.status_code == 400, body
            assert answer.json()["error"] == "UsageError"
            assert answer.json()["exit_status"] == 2
        assert http.post("/v1/builds", content=b"{not json").status_code == 400
        assert http.get("/v1/builds?limit=no").status_code == 400
        assert http.get("/v1/builds?limit=-5").status_code == 400
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("DELETE", "/v1/builds", 405),
            ("GET", "/v1/../etc/passwd", 404),
        ):
            answer = http.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"] == "UsageError"
        for path in ("machines/nothing", "builds/nothing", "builds/nothing/events", "builds/nothing/outputs", "images/nothing"):
            answer = http.get(f"/v1/{path}")
            assert answer.status_code == 404, path
            assert answer.json()["error"] == "NotFoundError", path
        assert http.get("/v1/status").json()["builds"] == 0


def test_wrong_configuration_is_told_to_whoever_asks(daemon: Daemon) -> None:
    daemon.machine("a", "cpu-count: 0\nmemory: 1\n")
    with daemon.start() as client:
        with pytest.raises(ConfigError) as caught:
            client.get("/v1/machines")
        assert [(problem.line, problem.field) for problem in caught.value.problems] == [(4, "cpu-count"), (5, "memory")]
        assert caught.value.exit_status == 3
        with pytest.raises(ConfigError):
            client.create_build(request().to_json(), iter([b""]))
        daemon.machine("a")  # no restart is needed
        assert [machine["name"] for machine in client.get("/v1/machines")][:3] == ["a", "binfmt", "build-vm"]


def test_what_the_host_refuses_is_told(daemon: Daemon) -> None:
    with daemon.start() as client:
        daemon.paths.builds.rmdir()
        daemon.paths.builds.write_text("in the way")
        with pytest.raises(HostError, match=r"File exists|Not a directory"):
            client.create_build(request().to_json(), iter([b""]))
        assert client.get("/v1/builds") == []


def test_images_in_use_and_damaged_ones(daemon: Daemon) -> None:
    used = place_image(daemon.paths.cache / "images", "b" * 64)
    with daemon.start() as client:
        (current, *_, old) = client.get("/v1/images")
        assert (current["state"], old["state"], old["digest"]) == ("not built", "superseded", "b" * 64)
        damaged = daemon.paths.cache / "images" / current["digest"]
        damaged.mkdir()
        states = [row["state"] for row in client.get("/v1/images")]
        assert (states[0], states[-1]) == ("damaged", "superseded")
        with pytest.raises(ImageError) as caught:
            client.get("/v1/images/debian")
        assert "offload image build --rebuild" in caught.value.hint
        directory = left_over(daemon, "user", "machine", digest="b" * 64)
        for name in ("debian", "b" * 64, "b" * 12):
            with pytest.raises(NotAllowedError, match="user runs on it"):
                client.delete(f"/v1/images/{name}")
        assert client.post("/v1/images/gc")["images"] == []
        shutil.rmtree(directory)
        assert client.delete(f"/v1/images/{'b' * 12}") == ["b" * 64]
    assert not used.exists()


def test_nobody_can_do_it(daemon: Daemon) -> None:
    with daemon.start() as client:
        with pytest.raises(NotFoundError, match="no machine called 'nothing'"):
            client.create_build(request(machine="nothing").to_json(), iter([b""]))
        with pytest.raises(NoMachineError) as caught:
            client.create_build(request(recipe={"systems": ["i586-gnu"]}).to_json(), iter([b""]))
        assert "build-vm: builds x86_64-linux, i686-linux, not i586-gnu" in caught.value.detail
        assert client.get("/v1/builds") == []


def test_what_a_command_line_asks_for_becomes_requests(daemon: Daemon) -> None:
    file = RecipeFile(path="p/offload.yaml", text="version: 1\nstep: [make]\n")
    right = Asked(recipe={"name": "p"}, changes=Changes(command=("make",)), systems=("arm64", "amd64"))
    with daemon.start() as client:
        made = client.post("/v1/requests", asdict(right))
        assert [(one["system"], one["recipe"]["steps"]) for one in made] == [
            ("aarch64-linux", ["make"]),
            ("x86_64-linux", ["make"]),
        ]
        with pytest.raises(ConfigError) as caught:
            client.post("/v1/requests", asdict(replace(right, file=file)))
        assert [(problem.file, problem.line) for problem in caught.value.problems] == [(file.path, 1), (file.path, 2)]
        # What a shell can give, and JSON only escaped.
        odd = Changes(command=("echo", "\udcff"), packages=("\udcff",))
        with pytest.raises(UsageError, match=r"the command: .*only UTF-8 without NUL"):
            client.post("/v1/requests", asdict(replace(right, changes=odd)))
        with pytest.raises(UsageError, match="--system: unknown system type"):
            client.post("/v1/requests", asdict(replace(right, systems=("\udcff",))))
        with pytest.raises(UsageError, match=r"--date: .*; --cpu: |--cpu: .*; --date: "):
            client.post("/v1/requests", asdict(replace(right, options={"date": "never", "cpu": "\udcff"})))


def test_a_machine_that_cannot_start(daemon: Daemon) -> None:
    daemon.machine("broken")
    with daemon.start() as client:
        *_, last = client.stream("POST", "/v1/machines/broken/start")
        assert (last["event"], last["error"]) == ("error", "HostError")
        view = client.get("/v1/machines/broken")
        assert view["state"] == MachineState.STOPPED
        assert "does not work" in view["reason"]
        with pytest.raises(NotFoundError, match="does not run"):
            client.post("/v1/machines/broken/stop")
    assert not list(daemon.paths.instances.iterdir())


def test_a_build_that_cannot_be_begun(daemon: Daemon) -> None:
    daemon.machine("broken")
    with daemon.start() as client:
        build = client.create_build(request(machine="broken").to_json(), iter([b"a tar", b" in pieces"]))
        told = events(client, build)
        assert [event["state"] for event in told if event["event"] == "state"] == ["queued", "preparing", "preparing"]
        assert told[-2]["event"] == "error"
        assert told[-1]["event"] == "end"
        assert (told[-1]["state"], told[-1]["exit_status"]) == ("errored", 75)
        assert events(client, build) == told
        view = client.get(f"/v1/builds/{build}")
        assert view["state"] == BuildState.ERRORED
        assert view["result"]["error"]["error"] == "HostError"
        assert [file.name for file in sorted((daemon.paths.builds / build).iterdir())] == ["build.json", "events.ndjson"]
        with pytest.raises(NotFoundError, match="has no outputs"):
            client.get(f"/v1/builds/{build}/outputs")
        client.post(f"/v1/builds/{build}/cancel")  # it has ended: nothing happens
        assert client.get("/v1/status")["builds"] == 0


def test_a_build_waits_for_its_source_and_can_be_cancelled(daemon: Daemon) -> None:
    with daemon.start() as client, raw(daemon) as http:
        build = client.post("/v1/builds", request().to_json())["build"]
        assert client.get("/v1/status")["builds"] == 1
        row = client.post(f"/v1/builds/{build}/cancel")
        assert row["state"] == BuildState.CANCELLED
        told = events(client, build)
        assert (told[-1]["state"], told[-1]["exit_status"]) == ("cancelled", 130)
        answer = http.put(f"/v1/builds/{build}/source", content=b"too late")
        assert answer.status_code == 400
        assert "has ended" in answer.json()["what"]
        assert client.get("/v1/status")["builds"] == 0


def half_a_source(daemon: Daemon, build: str) -> socket.socket:
    """A client that has sent a part of the source."""
    sender = socket.socket(socket.AF_UNIX)
    sender.connect(str(daemon.paths.socket))
    sender.sendall(f"PUT /v1/builds/{build}/source HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf".encode())
    return sender


def wait_for_source(daemon: Daemon, build: str) -> None:
    deadline = time.monotonic() + 10
    while not (daemon.paths.builds / build / "source.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_client_that_dies_while_it_sends_the_source(daemon: Daemon) -> None:
    with daemon.start() as client:
        build = client.post("/v1/builds", request().to_json())["build"]
        half_a_source(daemon, build).close()
        told = events(client, build)
        assert told[-1]["state"] == "cancelled"
        assert "source was not received" in told[-2]["what"]
        assert client.get("/v1/status")["builds"] == 0
    daemon.signal(signal.SIGTERM)
    daemon.wait()


def test_a_build_that_is_cancelled_while_its_source_is_sent(daemon: Daemon) -> None:
    with daemon.start() as client, raw(daemon) as http:
        build = client.post("/v1/builds", request().to_json())["build"]
        with half_a_source(daemon, build) as sender:
            wait_for_source(daemon, build)
            assert http.put(f"/v1/builds/{build}/source", content=b"a second").status_code == 400
            assert client.post(f"/v1/builds/{build}/cancel")["state"] == BuildState.CANCELLED
            sender.sendall(b"x" * 996)
            assert sender.recv(100).startswith(b"HTTP/1.1 400")
        assert not list((daemon.paths.builds / build).glob("source*"))
        assert client.get("/v1/status")["builds"] == 0


def test_sigterm_waits_for_builds_and_a_second_one_does_not(daemon: Daemon) -> None:
    with daemon.start() as client:
        build = client.post("/v1/builds", request().to_json())["build"]
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    time.sleep(1)
    assert daemon.process is not None
    assert daemon.process.poll() is None
    daemon.signal(signal.SIGTERM)
    daemon.wait(8)
    assert time.monotonic() - began < 8
    with open_database(daemon.paths.database) as database:
        assert database.build(build).state is BuildState.CANCELLED
        assert "the daemon was stopped" in database.build(build).result["error"]["what"]


def test_builds_of_a_killed_daemon_are_told_to_be_lost(daemon: Daemon) -> None:
    with daemon.start() as client:
        build = client.post("/v1/builds", request().to_json())["build"]
    daemon.signal(signal.SIGKILL)
    assert daemon.process is not None
    daemon.process.communicate()
    with daemon.start() as client:
        told = events(client, build)
        assert (told[-1]["event"], told[-1]["state"], told[-1]["exit_status"]) == ("end", "errored", 75)
        assert told[-2]["error"] == "MachineLostError"
        assert client.get(f"/v1/builds/{build}")["state"] == BuildState.ERRORED


def left_over(daemon: Daemon, name: str, purpose: Any, started: int = 1, digest: str = "abc") -> Path:
    """The directory of an instance whose QEMU is gone."""
    directory = daemon.paths.instances / name
    directory.mkdir(parents=True)
    (directory / "console.log").write_text("last words\n")
    record = InstanceRecord(
        plan=replace(plan(name), boot=replace(BOOT, digest=digest)),
        pid=2**22 - 1,
        started=started,
        ports={22: 1},
        cores=(0,),
        missing_features=(),
        purpose=purpose,
        clock_offset=0.0,
        began=1.0,
    )
    write_record(directory / "instance.json", record)
    return directory


def test_a_machine_that_ended_while_no_daemon_ran(daemon: Daemon) -> None:
    daemon.machine("lost")
    directory = left_over(daemon, "lost", "machine")
    with open_database(daemon.paths.database) as database:
        database.move_machine("lost", MachineState.STARTING)
        database.move_machine("lost", MachineState.RUNNING)
    with daemon.start() as client:
        deadline = time.monotonic() + 10
        while (view := client.get("/v1/machines/lost"))["state"] == MachineState.RUNNING and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (view["state"], view["instance"]) == (MachineState.CRASHED, None)
        assert view["reason"] == "ended while no daemon ran"
        assert client.get("/v1/status")["machines"] == 0
        *_, last = client.stream("POST", "/v1/machines/lost/start")
        assert last["error"] == "HostError"
        assert client.get("/v1/machines/lost")["state"] == MachineState.STOPPED
    assert not directory.exists()
    assert len(list((daemon.paths.logs / "lost").glob("*/console.log"))) == 1


@pytest.mark.parametrize("wrong", ["", "cpu-count: 0\n"])
def test_what_an_earlier_daemon_left_is_brought_to_rest(daemon: Daemon, wrong: str) -> None:
    if wrong:
        daemon.machine("wrong", wrong)
    left = [left_over(daemon, "build-1", "build"), left_over(daemon, "undeclared", "machine")]
    (daemon.paths.instances / "empty").mkdir()
    with open_database(daemon.paths.database) as database:
        database.move_machine("gone", MachineState.STARTING)
    with daemon.start():
        deadline = time.monotonic() + 10
        while list(daemon.paths.instances.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(directory.exists() for directory in left)
        assert not list(daemon.paths.instances.iterdir())
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    with open_database(daemon.paths.database) as database:
        assert database.machine("gone").state is MachineState.CRASHED


def wait_ended(client: Client, pid: int) -> None:
    deadline = time.monotonic() + 20
    while client.answers() and time.monotonic() < deadline:
        time.sleep(0.05)
    while Path(f"/proc/{pid}").exists() and "(python) Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_client_starts_a_daemon_when_none_answers(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in daemon.env.items():
        monkeypatch.setenv(name, value)
    with Client(daemon.paths) as client:
        client.ensure_daemon()
        pid = client.get("/v1/status")["pid"]
        client.ensure_daemon()
        assert client.get("/v1/status")["pid"] == pid
        client.post("/v1/stop")
        wait_ended(client, pid)


def test_the_client_starts_another_daemon_when_the_first_was_just_ending(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in daemon.env.items():
        monkeypatch.setenv(name, value)
    daemon.paths.state.mkdir(parents=True)
    with (daemon.paths.state / "offloadd.lock").open("w") as lock, Client(daemon.paths) as client:
        # As one that does not serve any more, and is not gone yet.
        fcntl.flock(lock, fcntl.LOCK_EX)
        ending = threading.Timer(1.0, fcntl.flock, [lock, fcntl.LOCK_UN])
        ending.start()
        client.ensure_daemon()
        ending.join()
        pid = client.get("/v1/status")["pid"]
        client.post("/v1/stop")
        wait_ended(client, pid)


def test_a_daemon_that_does_not_come_up(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in daemon.env.items():
        monkeypatch.setenv(name, value)
    daemon.paths.state.mkdir(parents=True)
    daemon.paths.database.write_bytes(b"this is no database " * 1000)
    with Client(daemon.paths) as client, pytest.raises(DaemonError, match="does not start") as caught:
        client.ensure_daemon()
    assert "cannot be used" in caught.value.detail


def test_an_answer_that_is_no_json_is_an_error_of_ours(daemon: Daemon) -> None:
    daemon.paths.runtime.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.paths.socket))
        listener.listen()
        listener.settimeout(10)
        with Client(daemon.paths) as client:

            def answer() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 500 Oh\r\nContent-Length: 5\r\n\r\nsorry")

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(DaemonError, match="answered 500") as caught:
                client.get("/v1/status")
            thread.join()
    assert caught.value.detail == "sorry"
    assert not isinstance(caught.value, UsageError)
    assert json.dumps(caught.value.to_json())


def test_outputs_of_a_daemon_that_went_away(daemon: Daemon, tmp_path: Path) -> None:
    """It is not the guest's fault that they are cut off."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(1000))

    daemon.paths.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.paths.socket))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        with Client(daemon.paths) as client, pytest.raises(DaemonError, match="went away: it sent a part of the outputs"):
            client.fetch_outputs("b", tmp_path / "outputs.tar")
        thread.join()


def test_another_name_of_a_machine_is_as_good(daemon: Daemon) -> None:
    client = daemon.start()
    assert client.post("/v1/machines/hurd-vm/drain")["mode"] == "drained"
    assert client.get("/v1/machines/childhurd")["mode"] == "drained"
    client.post("/v1/machines/hurd-vm/offline")
    for what in ("test", "start"):
        with pytest.raises(NotAllowedError, match="childhurd: is offline"):
            list(client.stream("POST", f"/v1/machines/hurd-vm/{what}"))
    client.post("/v1/machines/hurd-vm/resume")
    assert client.get("/v1/machines/childhurd")["mode"] == "online"
