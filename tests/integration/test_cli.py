"""The real command line against a daemon that says what the test wants: exit statuses, streams, signals, completion."""

from __future__ import annotations

import io
import json
import os
import signal
import socketserver
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import TypeAdapter

from offload_cli.main import COMMANDS, make_app
from offloadd.config.requests import make_requests
from offloadd.errors import BootError, NoMachineError, OffloadError
from offloadd.model.asked import Asked

BUILD = "0a1b2c3d"
RESULT: dict[str, Any] = {"build": BUILD, "name": "p", "version": "0", "state": "succeeded"}
END: dict[str, Any] = {"event": "end", "state": "succeeded", "exit_status": 0, "result": RESULT}
LOG = {"event": "log", "text": "hello from the build\n"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubDaemon

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        nothing = (404, {"error": "NotFoundError", "what": "no such thing"})
        answer = self.server.answers.get(f"{self.command} {self.path}", nothing)
        if self.command == "PUT":
            self.server.source = self._chunks()
        elif length := int(self.headers.get("Content-Length") or 0):
            body = json.loads(self.rfile.read(length))
            if self.path == "/v1/requests":
                answer = _requests(body)
            else:
                self.server.bodies.append(body)
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        if isinstance(body, list) and body and "event" in body[0]:
            self._stream(body)
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _stream(self, events: list[dict[str, Any]]) -> None:
        """JSON lines until the connection closes; the event `wait` waits for a request to cancel."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            if event["event"] == "wait":
                self._wait_cancelled()
                return
            # As the daemon writes them: not escaped.
            self.wfile.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
            self.wfile.flush()

    def _wait_cancelled(self) -> None:
        deadline = time.monotonic() + 20
        while not any("cancel" in request for request in self.server.asked) and time.monotonic() < deadline:
            time.sleep(0.02)


def _requests(asked: Any) -> Any:
    """As the daemon makes them."""
    try:
        return [request.to_json() for request in make_requests(TypeAdapter(Asked).validate_python(asked))]
    except OffloadError as exc:
        return 400, exc.to_json()


class StubDaemon(socketserver.ThreadingUnixStreamServer):
    """Answers `METHOD /path` with what `answers` has: a value, or (status, value)."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.source = b""
        self.answers: dict[str, Any] = {
            "GET /v1/status": {"version": "0", "pid": 1},
            "POST /v1/builds": (201, {"build": BUILD}),
            f"PUT /v1/builds/{BUILD}/source": (202, {"build": BUILD}),
            f"POST /v1/builds/{BUILD}/cancel": {"build": BUILD, "name": "p", "version": "0", "state": "cancelled"},
            f"GET /v1/builds/{BUILD}/events": [LOG, END],
        }
        (root / "run/offload").mkdir(parents=True)
        super().__init__(str(root / "run/offload/offloadd.sock"), _Handler)

    @property
    def env(self) -> Mapping[str, str]:
        names = {"XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "state", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache"}
        return os.environ | {name: str(self.root / folder) for name, folder in names.items()} | {"TERM": "dumb"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "offload_cli", *arguments]
        return subprocess.Popen(
            command,
            env=self.env,
            cwd=self.root,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """What `offload` writes to its two streams."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert "Traceback" not in err
        return out, err


@pytest.fixture
def daemon() -> Iterator[StubDaemon]:
    # Not pytest's own directory: its path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="offload-") as root, StubDaemon(Path(root)) as server:
        (Path(root) / "p").mkdir()
        (Path(root) / "p/file").write_text("content")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def _tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_build(daemon: StubDaemon) -> None:
    daemon.answers[f"GET /v1/builds/{BUILD}/outputs"] = _tar(product=b"made")
    out, err = daemon.run("build", "--date", "2020-01-01", "-p", "gcc", "-o", "p/out", "p", "--", "make", "a b")
    assert out == "hello from the build\n"
    assert "p 0: succeeded" in err
    assert (daemon.root / "p/out/product").read_text() == "made"
    request = daemon.bodies[0]
    assert request["recipe"]["steps"] == ["make 'a b'"]
    assert (request["recipe"]["packages"], request["date"]) == (["gcc"], "2020-01-01T00:00:00Z")
    with tarfile.open(fileobj=io.BytesIO(daemon.source)) as tar:
        assert tar.getnames() == ["file"]
    daemon.run("build", "-o", "p/out", "p", "--", "make")
    with tarfile.open(fileobj=io.BytesIO(daemon.source)) as tar:
        assert tar.getnames() == ["file"], "the result of an earlier build is no source"


def test_a_log_with_all_kinds_of_line_ends(daemon: StubDaemon) -> None:
    text = "a\u2028b\u0085c\x0bd\x1ce\rf\n" + "long " * 100_000 + "\n"
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [{"event": "log", "text": text}, END]
    process = daemon.start("build", "p", "--", "make")
    assert process.stdout is not None
    # Bytes: Python would translate the carriage return.
    out = process.stdout.buffer.read()  # type: ignore[attr-defined]
    assert process.wait(timeout=60) == 0
    assert out.decode() == text


def test_json_is_all_that_is_on_standard_output(daemon: StubDaemon) -> None:
    out, err = daemon.run("build", "--json", "p", "--", "make")
    assert json.loads(out)["out"] == str(daemon.root / "offload-out/p-0")
    assert "hello from the build" in err
    out, _ = daemon.run("build", "--json", "--date", "never", "p", "--", "make", status=2)
    assert json.loads(out)["error"]["error"] == "UsageError"


@pytest.mark.parametrize(("state", "status"), [("failed", 1), ("timed-out", 124), ("errored", 75), ("cancelled", 130)])
def test_a_build_that_does_not_succeed(daemon: StubDaemon, state: str, status: int) -> None:
    error = BootError("not ready", subject="vm", hint="a hint", detail="last \x1b[2Jwords").to_json()
    end = {"event": "end", "state": state, "exit_status": status, "result": {**RESULT, "state": state, "error": error}}
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [LOG, end]
    # Of such a build these are not whole.
    daemon.answers[f"GET /v1/builds/{BUILD}/outputs"] = b"half a tar"
    _, err = daemon.run("build", "p", "--", "make", status=status)
    assert "offload: vm: not ready\n  | last words\n  hint: a hint\n" in err
    assert (daemon.root / "offload-out/p-0/build.json").exists() == (state != "cancelled")


def test_keep_failed(daemon: StubDaemon) -> None:
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [{**END, "state": "failed", "exit_status": 1}]
    daemon.answers[f"GET /v1/builds/{BUILD}/outputs"] = _tar(core=b"")
    daemon.run("build", "--keep-failed", "p", "--", "make", status=1)
    assert daemon.bodies[0]["keep-failed"] is True
    assert (daemon.root / "offload-out/p-0/failed/core").exists()


def test_an_error_of_the_daemon_keeps_its_exit_status(daemon: StubDaemon) -> None:
    error = NoMachineError("no machine can do this build", subject="p", detail="vm: too old")
    daemon.answers["POST /v1/builds"] = (409, error.to_json())
    _, err = daemon.run("build", "p", "--", "make", status=4)
    assert "offload: p: no machine can do this build\n  | vm: too old" in err


def test_a_daemon_that_goes_away(daemon: StubDaemon) -> None:
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [LOG]
    _, err = daemon.run("build", "p", "--", "make", status=75)
    assert "ended during the build" in err


def test_nobody_follows_any_more(daemon: StubDaemon) -> None:
    """The terminal of standard error is gone: a build that nobody hears of is not left running."""
    step = {"event": "step", "index": 1, "count": 1, "command": "make"}
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [step, {"event": "wait"}]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "offload_cli", "build", "p", "--", "make"]
    done = subprocess.run(command, env=daemon.env, cwd=daemon.root, stdout=writer, stderr=writer, timeout=30, check=False)
    os.close(writer)
    assert done.returncode != 0
    assert f"POST /v1/builds/{BUILD}/cancel" in daemon.asked


def into_full_disk(daemon: StubDaemon, *words: str, unbuffered: str) -> tuple[int, str]:
    """Exit status and standard error."""
    command = [sys.executable, "-m", "offload_cli", *words]
    env = {**daemon.env, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, env=env, cwd=daemon.root, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [("--help",), ("builds",), ("builds", "--json"), ("log", BUILD)], ids=" ".join)
def test_a_full_disk_below_the_output(daemon: StubDaemon, words: tuple[str, ...], unbuffered: str) -> None:
    daemon.answers["GET /v1/builds?limit=20"] = []
    status, err = into_full_disk(daemon, *words, unbuffered=unbuffered)
    assert (status, err.splitlines()[-1]) == (75, "offload: the disk is full: not all of the output was written")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_below_the_log(daemon: StubDaemon, unbuffered: str) -> None:
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [LOG, LOG, END]
    status, err = into_full_disk(daemon, "build", "p", "--", "make", unbuffered=unbuffered)
    assert status == 0, "the build's own"
    assert err.count("offload: the log cannot be written any more: the disk is full\n") == 1
    assert "p 0: succeeded" in err
    assert (daemon.root / "offload-out/p-0/build.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_cancel_the_build(daemon: StubDaemon, number: signal.Signals) -> None:
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [LOG, {"event": "wait"}]
    process = daemon.start("build", "p", "--", "make")
    assert process.stdout is not None
    assert process.stdout.readline() == LOG["text"]
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"POST /v1/builds/{BUILD}/cancel" in daemon.asked
    assert "Traceback" not in err


def test_a_source_that_cannot_be_sent_cancels_the_build(daemon: StubDaemon) -> None:
    os.mkfifo(daemon.root / "p/fifo")
    _, err = daemon.run("build", "p", "--", "make", status=2)
    assert "is a fifo" in err
    assert f"POST /v1/builds/{BUILD}/cancel" in daemon.asked


def decision(system: str, machine: str | None) -> dict[str, Any]:
    return {
        "system": system,
        "machine": machine,
        "candidates": [{"machine": machine, "kind": "local", "why": "native"}] if machine else [],
        "passed_over": {"tower": "is drained"},
        "kinds": {"tower": "ssh"},
        "unrelated": [],
        "hint": "",
    }


def test_explain_is_one_document(daemon: StubDaemon) -> None:
    daemon.answers["POST /v1/route"] = decision("x86_64-linux", "local")
    arguments = ("build", "--explain", "p", "-s", "amd64")
    out, _ = daemon.run(*arguments, "--json", "--", "make")
    assert json.loads(out)["machine"] == "local"
    out, _ = daemon.run(*arguments, "-s", "i386", "--json", "--", "make")
    assert [told["machine"] for told in json.loads(out)] == ["local", "local"]
    out, _ = daemon.run(*arguments, "--", "make")
    assert out.splitlines() == [
        "x86_64-linux: local",
        "RANK  MACHINE  KIND   WHY",
        "1     local    local  native",
        "-     tower    ssh    no: is drained",
        "source   2.0 KiB: in frames",
    ]
    daemon.answers["POST /v1/route"] = decision("x86_64-linux", None)
    daemon.run(*arguments, "--", "make", status=4)
    daemon.run("route", "amd64", status=4)
    assert not any("builds" in request for request in daemon.asked)


def test_explain_tells_the_automatic_date(daemon: StubDaemon) -> None:
    (daemon.root / "p/debian").mkdir()
    end = " -- A <a@b.c>  Mon, 02 Jan 2012 10:00:00 +0000"
    (daemon.root / "p/debian/changelog").write_text(f"p (1) s; urgency=low\n\n{end}\n")
    daemon.answers["POST /v1/route"] = decision("x86_64-linux", "local")
    _, err = daemon.run("build", "--explain", "--date", "auto", "p", "--", "make")
    assert "the date is 2012-01-02T10:00:00Z: debian/changelog of p 1" in err


def test_several_systems_side_by_side(daemon: StubDaemon) -> None:
    arguments = ("build", "-s", "amd64", "-s", "i386", "-o", "out", "p")
    out, err = daemon.run(*arguments, "--", "make")
    assert out == "", "their logs would be mixed"
    assert {"==> x86_64-linux: succeeded", "==> i686-linux: succeeded"} <= set(err.splitlines())
    for system in ("x86_64-linux", "i686-linux"):
        assert (daemon.root / "out" / system / "build.log").read_text() == "hello from the build\n"
    out, _ = daemon.run(*arguments, "--json", "--", "make")
    assert [told["state"] for told in json.loads(out)] == ["succeeded", "succeeded"]
    failed = {**END, "state": "failed", "exit_status": 1, "result": {**RESULT, "state": "failed"}}
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [LOG, failed]
    _, err = daemon.run(*arguments, "--", "make", status=1)
    assert "  | hello from the build" in err


def test_an_interrupt_cancels_all_of_them(daemon: StubDaemon) -> None:
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [LOG, {"event": "wait"}]
    process = daemon.start("build", "-s", "amd64", "-s", "i386", "-o", "out", "p", "--", "make")
    follow = f"GET /v1/builds/{BUILD}/events"
    deadline = time.monotonic() + 20
    while daemon.asked.count(follow) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert daemon.asked.count(f"POST /v1/builds/{BUILD}/cancel") >= 2


def test_wrong_usage_is_told_before_anything_is_begun(daemon: StubDaemon) -> None:
    daemon.run("build", "p", status=5)
    daemon.run("build", "./nowhere", status=5)
    daemon.run("build", "--no-check", "p", "--", "make", status=2)
    daemon.run("nonsense", status=2)
    daemon.run("vm", "exec", "vm", status=2)
    assert daemon.asked == []
    (daemon.root / "p/offload.yaml").write_text("steps: make\ncolour: red\n")
    _, err = daemon.run("build", "p", status=3)
    assert "offload.yaml:1: steps" in err
    assert "offload.yaml:2: colour" in err
    (daemon.root / "p/offload.yaml").unlink()
    daemon.run("build", "-s", "arm46", "p", "--", "make", status=2)
    assert "SYSTEM: unknown system type 'arm46'" in daemon.run("route", "arm46", status=2)[1]
    daemon.run("build", "-o", "p", "p", "--", "make", status=2)
    assert "the command: " in daemon.run("build", "p", "--", "echo", os.fsdecode(b"\xff"), status=2)[1]
    assert set(daemon.asked) == {"GET /v1/status", "POST /v1/requests"}


@pytest.mark.parametrize("name", ["", "..", "../status", "a/b", "x?y", "50%"])
def test_a_name_that_would_lead_elsewhere(daemon: StubDaemon, name: str) -> None:
    for command in (("vm", "show"), ("vm", "stop"), ("image", "rm"), ("log",), ("cancel",)):
        assert "nothing of that name" in daemon.run(*command, name, status=5)[1]
    assert daemon.asked == []


def test_log_without_follow_ends_although_the_build_goes_on(daemon: StubDaemon) -> None:
    daemon.answers[f"GET /v1/builds/{BUILD}/events"] = [LOG, {"event": "wait"}]
    assert daemon.run("log", BUILD)[0] == LOG["text"]
    daemon.asked.clear()
    assert [json.loads(line) for line in daemon.run("log", "--json", BUILD)[0].splitlines()] == [LOG]


def test_a_reader_that_has_enough(daemon: StubDaemon) -> None:
    daemon.answers["GET /v1/builds?limit=20"] = []
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "offload_cli", "builds"]
    done = subprocess.run(command, env=daemon.env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_start_of_a_machine(daemon: StubDaemon) -> None:
    phases = [{"event": "phase", "text": "booting", "fraction": None}]
    daemon.answers["POST /v1/machines/vm/start"] = [*phases, {"event": "done", "name": "vm", "ssh_port": 11022}]
    out, err = daemon.run("vm", "start", "vm")
    assert out == ""
    assert "==> booting\n" in err
    assert "127.0.0.1:11022" in err
    error = BootError("panicked", subject="vm")
    daemon.answers["POST /v1/machines/vm/start"] = [*phases, {"event": "error", **error.to_json()}]
    assert "offload: vm: panicked" in daemon.run("vm", "start", "vm", status=75)[1]


TEMPLATE: dict[str, Any] = {
    "digest": "0123456789abcdef" * 4,
    "machine": "vm",
    "image": "debian",
    "cpu": "IvyBridge",
    "memory_mib": 2048,
    "qemu_version": "7.2.22",
    "accelerator": "tcg",
    "made": "2026-11-01T00:00:00Z",
    "size_on_disk": 150 << 20,
    "in_memory": True,
    "stale": "",
}


def test_templates(daemon: StubDaemon) -> None:
    daemon.answers["GET /v1/templates"] = [TEMPLATE]
    out, _ = daemon.run("template", "list")
    assert "0123456789ab  vm       debian  IvyBridge" in out
    assert out.rstrip().endswith("in memory")
    assert json.loads(daemon.run("template", "list", "--json")[0]) == [TEMPLATE]
    daemon.answers["GET /v1/templates"] = []
    assert "No templates yet" in daemon.run("template", "list")[0]
    daemon.answers["DELETE /v1/templates/0123"] = TEMPLATE
    assert "removed 0123456789ab: vm on IvyBridge with 2.0 GiB" in daemon.run("template", "rm", "0123")[1]
    daemon.answers["POST /v1/templates/gc"] = ["a" * 64]
    assert "removed 1 template\n" in daemon.run("template", "gc")[1]
    daemon.answers["POST /v1/images/gc"] = {"images": [], "environments": ["e"], "templates": ["t", "u"]}
    assert "removed 0 images, 1 environment and 2 templates\n" in daemon.run("image", "gc")[1]
    daemon.asked.clear()
    for wrong in ("", "../status", "0123?x"):
        daemon.run("template", "rm", wrong, status=5)
    assert daemon.asked == []


def test_a_template_that_is_made(daemon: StubDaemon) -> None:
    phase = {"event": "phase", "text": "saving it", "fraction": None}
    daemon.answers["POST /v1/templates/build?rebuild=true"] = [phase, {"event": "done", **TEMPLATE}]
    out, err = daemon.run("template", "build", "vm", "--date", "2012-06-01", "--cpu", "IvyBridge", "--rebuild")
    assert out == ""
    assert "==> saving it\n" in err
    assert "template 0123456789ab is ready: vm on IvyBridge with 2.0 GiB, 150.0 MiB, after" in err
    assert daemon.bodies == [{"machine": "vm", "date": "2012-06-01T00:00:00Z", "cpu": "IvyBridge"}]
    error = BootError("panicked", subject="vm")
    daemon.answers["POST /v1/templates/build"] = [phase, {"event": "error", **error.to_json()}]
    assert "offload: vm: panicked" in daemon.run("template", "build", "vm", status=75)[1]
    daemon.asked.clear()
    assert "--date" in daemon.run("template", "build", "vm", "--date", "never", status=2)[1]
    assert daemon.asked == []


def test_a_machine_that_is_kept(daemon: StubDaemon) -> None:
    daemon.answers["POST /v1/route"] = decision("x86_64-linux", "vm")
    daemon.run("build", "--keep-machine", "p", "--", "make")
    daemon.run("build", "p", "--", "make")
    daemon.run("route", "amd64", "--keep-machine")
    assert [body["keep-machine"] for body in daemon.bodies] == [True, False, True]


def test_a_machine_that_does_not_run(daemon: StubDaemon) -> None:
    daemon.answers["GET /v1/machines/vm"] = {"name": "vm", "instance": None, "logs": "/nonexistent", "console_log": None}
    for command in (("ssh", "vm"), ("exec", "vm", "--", "true"), ("console", "vm")):
        assert "offload vm start vm" in daemon.run("vm", *command, status=5)[1]
    assert json.loads(daemon.run("vm", "logs", "vm", "--json")[0]) == []
    daemon.run("vm", "logs", "vm", status=5)


WITH_EXAMPLES = [
    *(["build"], ["builds"], ["log"], ["cancel"], ["doctor"], ["env", "list"], ["daemon", "status"], ["daemon", "stop"]),
    *(["image", name] for name in ("list", "build", "show", "rm", "gc")),
    *(["template", name] for name in ("list", "build", "rm", "gc")),
    *(["vm", name] for name in ("list", "start", "stop", "show", "configuration", "console", "ssh", "exec", "logs")),
]


@pytest.mark.parametrize("command", WITH_EXAMPLES, ids=" ".join)
def test_every_help_text_has_an_example(daemon: StubDaemon, command: list[str]) -> None:
    out, _ = daemon.run(*command, "--help")
    assert "Example" in out
    assert f"\n    offload {' '.join(command)}" in out
    assert daemon.asked == []


def test_all_commands_are_in_the_help_and_each_is_found_alone(daemon: StubDaemon) -> None:
    def shown(app: typer.Typer) -> list[str]:
        return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

    assert shown(make_app()) == shown(make_app("no-such-command")) == list(COMMANDS)
    for command, module in COMMANDS.items():
        assert shown(make_app(command)) == [name for name in COMMANDS if COMMANDS[name] == module]
    listed = daemon.run("--help")[0].partition("Commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == list(COMMANDS)
    assert "did you mean 'build'" in daemon.run("biuld", status=2)[1].lower()


def test_a_build_loads_only_what_it_needs(daemon: StubDaemon) -> None:
    """To load pydantic and YAML takes as long as a small build."""
    command = [sys.executable, "-X", "importtime", "-m", "offload_cli", "build", "p", "--", "make"]
    done = subprocess.run(command, env=daemon.env, cwd=daemon.root, capture_output=True, text=True, timeout=60, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    # What import_module loads is not in the list itself, but all that this one imports is.
    assert {"offload_cli.order", "typer"} <= loaded
    assert not loaded & {"pydantic", "yaml", "trio", "asyncssh", "rich", "offload_cli.screen"}


def _complete(daemon: StubDaemon, line: str) -> list[str]:
    env = {**daemon.env, "_OFFLOAD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    command = [sys.executable, "-m", "offload_cli"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split()


def test_completion(daemon: StubDaemon) -> None:
    assert _complete(daemon, "offload vm show b") == ["build-vm"]
    assert _complete(daemon, "offload image show debian-ar") == ["debian-arm64", "debian-armhf"]
    assert _complete(daemon, "offload machine show lo") == ["local"]
    assert _complete(daemon, "offload build -s aa") == ["aarch64-linux"]
    daemon.answers["GET /v1/builds"] = [{"build": BUILD, "name": "p", "version": "0", "state": "failed"}]
    assert _complete(daemon, "offload log 0") == [BUILD]
    daemon.answers["GET /v1/templates"] = [TEMPLATE]
    assert _complete(daemon, "offload template rm 01") == ["0123456789ab"]
    assert _complete(daemon, "offload template build b") == ["build-vm"]


def test_completion_and_status_start_no_daemon(daemon: StubDaemon) -> None:
    (daemon.root / "run/offload/offloadd.sock").unlink()
    assert _complete(daemon, "offload log 0") == []
    assert "not running" in daemon.run("daemon", "status", status=5)[1]
    assert "not running" in daemon.run("daemon", "stop", status=5)[1]
    assert not (daemon.root / "state").exists()
