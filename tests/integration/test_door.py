"""The socket for a build daemon that runs as a user of its own: real daemon, real users, no guest."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offloadd.client import Client
from offloadd.daemon.door import MAX_CONNECTIONS, MAX_LEASES, SILENT_S
from offloadd.daemon.small_http import MAX_BODY, MAX_HEAD
from offloadd.paths import Paths

from ..conftest import World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root lets another user in")

USER, STRANGER = 64_123, 64_124
"""Nobody of this host's has these numbers."""
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGDUWqWvjZ8mn1ruZdXVGbcc3SCRYjO9wqK1TGxHvEB1"
REQUEST = {"daemon": "guix", "system": "x86_64-linux", "features": [], "local": True}


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> World:
    """Two remote machines for Guix, of which one's key is copied, and a guix-daemon whose user is USER."""
    made = make_world()
    folder = made.root / "config/offload/machines"
    folder.mkdir(parents=True)
    (made.root / "key").write_text("the secret\n")
    for name in ("tower", "secret"):
        (folder / f"{name}.yaml").write_text(
            f"kind: ssh\nname: {name}\nhost: 127.0.0.1\nport: 9\nhost-key: {KEY}\nprivate-key: {made.root}/key\n"
            f"systems: [x86_64-linux]\nparallel-builds: {MAX_LEASES + 9}\ndaemons: [guix, nix]\n"
        )
    return made


@pytest.fixture(scope="module")
def etc() -> Iterator[Path]:
    """Where everybody can come: Guix's configuration, which is USER's, and the door."""
    root = Path(tempfile.mkdtemp(prefix="offload-door-", dir="/tmp"))
    root.chmod(0o755)
    (root / "guix").mkdir()
    os.chown(root / "guix", USER, USER)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def door(world: World, etc: Path) -> Path:
    """The socket, which a daemon that ran before has opened."""
    world.run("machine", "list")
    told = world.run("guix", "setup", "tower", "--directory", etc / "guix", "--socket-directory", etc / "doors").stderr
    [found] = etc.glob("doors/*/offloadd.sock")
    assert f"user {USER}, who may ask our daemon for machines: {found}" in told
    assert "have it as a service" in told
    return found


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(path))
    return sock


def send(sock: socket.socket, method: str, path: str, body: bytes = b"") -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: offloadd\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)


def answer(sock: socket.socket) -> tuple[int, bytes]:
    data = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


def ask(path: Path, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
    with connect(path) as sock:
        send(sock, method, target, body)
        return answer(sock)


def lease(path: Path) -> tuple[socket.socket, dict[str, Any]]:
    """Ask for a machine; the connection, and what was said."""
    sock = connect(path)
    send(sock, "POST", "/v1/offload", json.dumps(REQUEST).encode())
    data = b""
    while not data.endswith(b"}\n"):
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    said: dict[str, Any] = json.loads(data.partition(b"\r\n\r\n")[2])
    return sock, said


def run_as(user: int, program: str, *arguments: str) -> str:
    """Run Python as that user, who can read nothing of ours; what it says."""
    command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "/usr/bin/python3", "-I", "-c", program]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd="/", timeout=60)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


CONNECT = """\
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
try:
    sock.sendall(b"GET /v1/offers HTTP/1.0\\r\\n\\r\\n")
    print((sock.recv(12) or b"dropped").decode())
except ConnectionError:
    print("dropped")
"""


def test_only_that_user_comes_in(door: Path, world: World) -> None:
    assert run_as(USER, CONNECT, str(door)) == "HTTP/1.1 200"
    assert "PermissionError" in run_as(STRANGER, CONNECT, str(door))
    assert "PermissionError" in run_as(USER, CONNECT, str(world.root / "run/offload/offloadd.sock"))
    folder, file = door.parent.stat(), door.stat()
    assert (folder.st_uid, folder.st_gid, stat.S_IMODE(folder.st_mode)) == (0, USER, 0o710)
    assert (file.st_uid, file.st_gid, stat.S_IMODE(file.st_mode)) == (0, USER, 0o660)
    record = next((world.state / "doors").iterdir())
    assert stat.S_IMODE(record.stat().st_mode) == 0o600


def test_who_has_the_socket_and_is_another_is_dropped(door: Path) -> None:
    """The kernel says who he is, whatever the modes are."""
    door.parent.chmod(0o711)
    door.chmod(0o666)
    try:
        assert run_as(STRANGER, CONNECT, str(door)) == "dropped"
    finally:
        door.chmod(0o660)
        door.parent.chmod(0o710)


def test_nothing_else_is_behind_it(door: Path, world: World) -> None:
    with connect(world.root / "run/offload/offloadd.sock") as sock:
        sock.sendall(b"GET /openapi.json HTTP/1.0\r\nHost: offloadd\r\n\r\n")
        described = json.loads(answer(sock)[1])
    allowed = {("GET", "/v1/offers"), ("GET", "/v1/offers/guix"), ("POST", "/v1/offload")}
    everything = {(method, path) for path in described["paths"] for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "PATCH")}
    assert len(everything) > 200
    assert allowed < everything
    others = [("GET", "/openapi.json"), ("GET", "/"), ("GET", "/v1/offers/../status"), ("GET", "//v1/offers"), ("OPTIONS", "*")]
    for method, path in sorted((everything - allowed) | set(others)):
        assert ask(door, method, path, b"{}" if method != "HEAD" else b"") == (404, b""), (method, path)


def test_machines_whose_key_is_not_copied_do_not_exist(door: Path, world: World, etc: Path) -> None:
    copy = etc / "guix/offload/ssh/tower"
    assert (copy.stat().st_uid, stat.S_IMODE(copy.stat().st_mode)) == (USER, 0o600)
    status, body = ask(door, "GET", "/v1/offers?daemon=nix")
    assert status == 200
    assert [(offer["machine"], offer["private-key"]) for offer in json.loads(body)] == [("tower", str(copy))]
    datum = ask(door, "GET", "/v1/offers/guix")[1]
    assert str(copy).encode() in datum
    sock, said = lease(door)
    sock.close()
    assert (said["offer"]["machine"], said["offer"]["private-key"]) == ("tower", str(copy))
    for text in (body, datum, json.dumps(said).encode()):
        assert b"secret" not in text
        assert str(world.root).encode() not in text


def test_a_file_that_is_wrong_takes_no_other_machine_away(door: Path, world: World) -> None:
    """Who writes a machine's file leaves it half written now and then; builds would be done here without a word."""
    wrong = world.root / "config/offload/machines/wrong.yaml"
    wrong.write_text("kind: build-vm\nima")
    try:
        assert b"/ssh/tower" in ask(door, "GET", "/v1/offers/guix")[1]
        sock, said = lease(door)
        sock.close()
    finally:
        wrong.unlink()
    assert said["decision"] == "accept"


def test_an_exported_live_list_asks_there_too(door: Path, world: World, etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIX_CONFIGURATION_DIRECTORY", str(etc / "guix"))
    assert f'(define socket-file "{door}")' in world.run("machine", "export", "--format", "guix", "--live").stdout
    assert f'(define socket-file "{door}")' in (etc / "guix/offload/machines.scm").read_text()


def test_what_is_no_request(door: Path) -> None:
    for body in (b"", b"{", b"[" * 100_000, b"{}", b"\xff", json.dumps(REQUEST | {"daemon": "nix"}).encode()):
        assert ask(door, "POST", "/v1/offload", body)[0] == 400
    for garbage in (b"\x16\x03\x01\n\n\n", b"GET /v1/offers HTTP/1.0\r\n" + b"a: b\r\n" * MAX_HEAD, b"POST / HTTP/1.1\r\n\r\n"):
        assert dropped(door, garbage)
    large = f"POST /v1/offload HTTP/1.1\r\nHost: o\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n".encode() + b" " * (MAX_BODY + 1)
    assert dropped(door, large)
    assert ask(door, "GET", "/v1/offers")[0] == 200


def dropped(door: Path, data: bytes) -> bool:
    with connect(door) as sock:
        try:
            sock.sendall(data)
            return not sock.recv(1)
        except ConnectionError:
            return True


def test_leases_and_connections_are_counted(door: Path, world: World) -> None:
    held = [lease(door) for _ in range(MAX_LEASES)]
    assert {said["decision"] for _, said in held} == {"accept"}
    late, said = lease(door)
    assert (said["decision"], said["why"]) == ("postpone", "too many builds at once")
    late.close()
    # Those that say nothing, until no more are let in; nobody else of the daemon's notices.
    silent = [connect(door) for _ in range(MAX_CONNECTIONS - MAX_LEASES)]
    assert dropped(door, b"")
    assert world.json("daemon", "status")
    began = time.monotonic()
    for sock in silent:
        assert sock.recv(1) == b""
        sock.close()
    assert time.monotonic() - began < SILENT_S + 5
    # The leases are silent, too, as they should be.
    held[0][0].settimeout(0.1)
    with pytest.raises(TimeoutError):
        held[0][0].recv(1)
    held.pop()[0].close()
    said = {"decision": "postpone"}
    while said["decision"] == "postpone":  # the daemon sees the closed connection a moment later
        late, said = lease(door)
        late.close()
    assert said["decision"] == "accept"
    for sock, _ in held:
        sock.close()


HOOK = """\
import os, sys
sys.path[:0] = sys.argv[1].split(":")
from offloadd.hook.ask import Unanswered, ask
try:
    print(ask("guix", "x86_64-linux", [], local=True, keys={}).decision)
except Unanswered as exc:
    print(exc)
"""


def test_a_hook_believes_only_whom_the_wrapper_names(door: Path, etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"export OFFLOAD_SOCKET={door}\nexport OFFLOAD_SOCKET_OWNER=0\n" in (etc / "guix/offload/hook").read_text()
    monkeypatch.setenv("OFFLOAD_SOCKET", str(door))
    code = str(Path(sys.modules["offloadd"].__path__[0]).parent)
    assert run_as(USER, HOOK, code) == "accept"
    theirs = etc / "theirs"
    server = "import socket; s = socket.socket(socket.AF_UNIX, fileno=0); s.listen(); print(1, flush=True); s.accept()"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(theirs))
        theirs.chmod(0o666)
        command = ["/usr/bin/python3", "-c", server]
        with subprocess.Popen(command, stdin=sock.fileno(), stdout=subprocess.PIPE, user=STRANGER) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"1\n"
            monkeypatch.setenv("OFFLOAD_SOCKET", str(theirs))
            assert run_as(USER, HOOK, code) == f"{theirs}: is served by another user ({STRANGER})"
            process.kill()


def test_it_is_there_again_after_a_restart_and_gone_after_undo(door: Path, world: World, etc: Path) -> None:
    held, _ = lease(door)
    world.run("daemon", "stop")
    assert held.recv(1) == b""
    held.close()
    deadline = time.monotonic() + 20
    while world.daemons() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not door.parent.exists()
    # What a killed one leaves is no hindrance, and neither is /run after a boot.
    door.parent.parent.rmdir()
    world.run("machine", "list")
    assert ask(door, "GET", "/v1/offers")[0] == 200
    world.run("guix", "setup", "--undo", "--directory", etc / "guix")
    assert not door.parent.exists()
    assert not (world.state / "doors").exists()


def test_a_way_that_others_can_change_is_refused(world: World, etc: Path) -> None:
    (etc / "open").mkdir()
    (etc / "open").chmod(0o777)
    arguments = ("guix", "setup", "tower", "--directory", etc / "guix", "--socket-directory")
    failed = world.run(*arguments, etc / "open", status=6)
    assert f"{etc}/open: can be changed by other users" in failed.stderr
    failed = world.run(*arguments, world.root / "doors", status=6)
    assert f"{world.root}: can be entered by its owner alone" in failed.stderr
    world.run("guix", "setup", "--undo", "--directory", etc / "guix")
    paths = Paths(config=etc, state=world.state, cache=etc, runtime=world.root / "run/offload")
    assert Client(paths).answers()
