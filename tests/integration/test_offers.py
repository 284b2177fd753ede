"""What build daemons are told of our machines: the real command line and the real daemon."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offloadd.guix.read import read_guix
from offloadd.guix.scheme import read_all
from offloadd.nix.read import read_nix

from ..conftest import World

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGDUWqWvjZ8mn1ruZdXVGbcc3SCRYjO9wqK1TGxHvEB1"


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> World:
    """A VM for both build daemons, a remote host for Guix alone, and one more for neither."""
    made = make_world()
    made.machine("both", "port-forwardings: {14077: 22}\ndaemons: [guix, nix]\nfeatures: [kvm]\nwarm: 0\n")
    made.machine("private", "warm: 0\n")
    remote = f"kind: ssh\nhost: far.invalid\nsystems: [aarch64-linux]\nhost-key: {KEY} root@far\nprivate-key: /k\n"
    (made.root / "config/offload/machines/far.yaml").write_text(
        f"{remote}overload-threshold: null\nspeed: 2.5\ndaemons: [guix]\n"
    )
    return made


def get(world: World, path: str) -> bytes:
    """The body of an answer to HTTP/1.0, as a machines.scm asks."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(world.root / "run/offload/offloadd.sock"))
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: offloadd\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return body


def offers(world: World, query: str = "") -> list[dict[str, Any]]:
    world.run("machine", "list")
    found: list[dict[str, Any]] = json.loads(get(world, f"/v1/offers{query}"))
    return found


def test_each_machine_with_daemons_is_offered(world: World) -> None:
    both, far = offers(world)
    assert (both["machine"], both["state"], both["host"], both["port"], both["user"]) == (
        "both",
        "stopped",
        "127.0.0.1",
        14077,
        "offloading",
    )
    # Its keys were made for it, before it was ever started.
    secrets = world.state / "secrets/both"
    assert both["private-key"] == str(secrets / "id_ed25519")
    assert (secrets / "id_ed25519").stat().st_mode & 0o777 == 0o600
    host_key = (secrets / "root/etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
    assert both["host-key"].split() == host_key[:2]
    assert (far["state"], far["host-key"], far["overload-threshold"]) == ("running", KEY, None)
    assert [offer["machine"] for offer in offers(world, "?daemon=nix")] == ["both"]
    assert [offer["machine"] for offer in offers(world, "?daemon=guix")] == ["both", "far"]


def test_those_that_are_drained_or_offline_are_not(world: World) -> None:
    for word in ("drain", "offline"):
        world.run("machine", word, "far")
        assert [offer["machine"] for offer in offers(world)] == ["both"]
    world.run("machine", "resume", "far")
    assert len(offers(world)) == 2


def test_a_childhurd_is_offered_when_it_has_an_image(world: World) -> None:
    assert "childhurd" not in [offer["machine"] for offer in offers(world)]
    image = world.root / "config/offload/images/hurd-guix.yaml"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_text("like: hurd-guix\npath: hurd.qcow2\n")
    try:
        [offer] = [offer for offer in offers(world, "?daemon=guix") if offer["machine"] == "childhurd"]
    finally:
        image.unlink()
    assert (offer["systems"], offer["port"], offer["overload-threshold"]) == (["i586-gnu"], 10022, 1.8)


def test_one_whose_keys_cannot_be_read_keeps_no_other_away(world: World) -> None:
    offers(world)
    key = world.state / "secrets/both/root/etc/ssh/ssh_host_ed25519_key.pub"
    kept = key.read_text()
    key.write_text("nonsense")
    try:
        assert [offer["machine"] for offer in offers(world)] == ["far"]
    finally:
        key.write_text(kept)
    assert len(offers(world)) == 2


def test_a_file_that_is_wrong_keeps_no_other_away(world: World) -> None:
    """Somebody is just writing it.  Build daemons would build by themselves what they have a machine for."""
    offers(world)
    wrong = world.root / "config/offload/machines/wrong.yaml"
    wrong.write_text("kind: build-vm\nima")
    try:
        assert '"far"' in get(world, "/v1/offers/guix").decode()
        told = world.run("machine", "export", "--format", "guix", status=3).stderr
        assert "wrong.yaml:2" in told
    finally:
        wrong.unlink()
    assert len(offers(world)) == 2


def test_a_live_list_has_what_runs(world: World) -> None:
    offers(world)
    (datum,) = read_all(get(world, "/v1/offers/guix").decode("ascii"), "answer")
    assert isinstance(datum.value, tuple)
    assert len(datum.value) == 1
    assert '"far"' in get(world, "/v1/offers/guix").decode()


def test_export_for_guix(world: World, tmp_path: Path) -> None:
    file = tmp_path / "machines.scm"
    done = world.run("machine", "export", "--format", "guix", "-o", file)
    assert "not running: both; Guix waits" in done.stderr
    assert file.stat().st_mode & 0o777 == 0o644
    (_, both), (_, far) = read_guix(file.read_text(), str(file))
    assert (both.port, both.features, both.overload_threshold) == (14077, ("kvm",), 0.8)
    assert (far.host, far.speed, far.overload_threshold) == ("far.invalid", 2.5, None)
    assert world.run("machine", "export", "--format", "guix").stdout == file.read_text()
    running = world.run("machine", "export", "--format", "guix", "--running")
    assert [offer.host for _, offer in read_guix(running.stdout, "-")] == ["far.invalid"]
    assert running.stderr == ""
    # Ours is written anew; the user's own is kept.
    world.run("machine", "export", "--format", "guix", "far", "-o", file)
    assert len(read_guix(file.read_text(), str(file))) == 1
    # A link is the user's, too.
    link = file.with_name("link.scm")
    link.symlink_to(file)
    assert "symbolic link" in world.run("machine", "export", "--format", "guix", "-o", link, status=6).stderr
    assert link.is_symlink()
    link.unlink()
    file.write_text("(list) ; mine\n")
    assert "not ours to overwrite" in world.run("machine", "export", "--format", "guix", "-o", file, status=6).stderr
    assert file.read_text() == "(list) ; mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["machines.scm"]


def test_export_for_nix(world: World, tmp_path: Path) -> None:
    file = tmp_path / "machines"
    world.run("machine", "export", "--format", "nix", "-o", file)
    ((_, both),) = read_nix(file)
    assert (both.port, both.user, both.systems) == (14077, "offloading", ("x86_64-linux",))
    assert "ssh://offloading@127.0.0.1:14077 " in world.run("machine", "export", "--format", "nix", "--scheme", "ssh").stdout
    snippet = world.run("machine", "export", "--format", "nix", "--ssh-config").stdout
    (tmp_path / "config").write_text(snippet)
    shown = subprocess.run(
        ["ssh", "-G", "-F", tmp_path / "config", "offload-both"], capture_output=True, text=True, check=True, timeout=30
    ).stdout.splitlines()
    assert {"hostname 127.0.0.1", "port 14077", "user offloading", "hostkeyalias offload-both"} <= set(shown)
    assert f"identityfile {both.private_key}" in shown
    refused = world.run("machine", "export", "--format", "nix", "far", status=5)
    assert "takes no builds of Nix" in refused.stderr


@pytest.mark.parametrize(
    "words", [("nix", "--live"), ("guix", "--live", "both"), ("guix", "--ssh-config"), ("guix", "--scheme", "ssh"), ("cows",)]
)
def test_what_makes_no_sense_is_refused(world: World, words: tuple[str, ...]) -> None:
    world.run("machine", "export", "--format", *words, status=2)


def test_the_live_file_needs_no_daemon(world: World) -> None:
    world.stop_daemon()
    text = world.run("machine", "export", "--format", "guix", "--live").stdout
    assert f'"{world.root}/run/offload/offloadd.sock"' in text
    assert not world.daemons()


def test_import(world: World, tmp_path: Path) -> None:
    machines = world.root / "config/offload/machines"
    before = set(machines.iterdir())
    file = tmp_path / "machines.scm"
    file.write_text(
        f'(list (build-machine (name "far.invalid") (user "offload") (systems \'("aarch64-linux")) (host-key "{KEY}"))\n'
        f' (build-machine (name "local") (user "me") (port 2222) (systems \'("i686-linux")) (host-key "{KEY}") (speed 3)))\n'
    )
    shown = world.run("machine", "import", file, "--dry-run")
    assert "offload@far.invalid:22: is declared already" in shown.stderr
    assert set(machines.iterdir()) == before
    try:
        (values,) = world.json("machine", "import", file)
        # `local` is the name of another.
        assert values["name"] == "local-2222"
        shown = world.json("machine", "show", "local-2222")["configuration"]
        assert (shown["kind"], shown["host"], shown["port"], shown["speed"]) == ("ssh", "local", 2222, 3.0)
        assert shown["daemons"] == ["guix"]
        assert "is declared already" in world.run("machine", "import", file).stderr
        assert set(machines.iterdir()) - before == {machines / "local-2222.yaml"}
    finally:
        (machines / "local-2222.yaml").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.scm", "(list\n  (f))", "m.scm:2:3: this is code"),
        ("m.scm", '(list (build-machine\n (name "a")', "without its"),
        ("m.scm", '(list (build-machine (name "-x") (user "u") (systems \'("i686-linux")) (host-key "k")))', "m.scm:1: host"),
        ("machines", "\nssh://h x86_64-linux /k 1 1 - - ??\n", "machines:2: the public host key is no base64"),
    ],
)
def test_import_tells_what_is_wrong(world: World, tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    assert words in world.run("machine", "import", tmp_path / name, status=3).stderr
    assert "cannot be read" in world.run("machine", "import", tmp_path / "missing", status=5).stderr


def test_status_tells_the_clocks(world: World) -> None:
    rows = {row["name"]: row for row in world.json("machine", "status")}
    assert rows["both"]["clock"] is None
    assert rows["both"]["date"] == "2020-01-01T00:00:00Z"
    assert rows["local"]["clock"] == rows["local"]["expected"]
    assert rows["far"]["fault"]
    text = world.run("machine", "status").stdout
    line = next(line for line in text.splitlines() if line.startswith("both "))
    assert "will start at 2020-01-01T00:00:00Z, shifted on purpose by -" in line
    assert "\nfar: " in text
