"""Screens of real QEMUs, which a boot sector of ours has written on; and the secrets of machines that run."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from offload_cli.terminal import clean
from offloadd.errors import NotFoundError
from offloadd.plan.machine import BootFiles, VmPlan
from offloadd.vm.instance import Instance
from offloadd.vm.screen import PNG, serve_screen

from ..conftest import World
from .bare_qemu import HALT, Bench

# Graphics mode 13h, 320 x 200; its first pixel (there are 4 of the picture for each) becomes red.
DRAW = b"\xb8\x13\x00\xcd\x10\xb8\x00\xa0\x8e\xc0\x26\xc6\x06\x00\x00\x04"
HELLO = b"RFB 003.008\n"
LIMIT_S = 60.0


def disk(path: Path) -> Path:
    """A disk whose boot sector draws and halts."""
    path.write_bytes((DRAW + HALT).ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return path


@pytest.fixture
def plan(bench: Bench) -> VmPlan:
    boot = BootFiles(image="i", digest="d", disk=disk(bench.root / "disk.img"))
    return replace(bench.plan(), system="i586-gnu", boot=boot, cpu_count=1, disk_slots=0, forwards=((0, 22), (0, 1004)))


async def wait_for_picture(instance: Instance) -> bytes:
    """When the mode of our boot sector is set."""
    while int.from_bytes((picture := await instance.screenshot())[16:20], "big") not in (320, 640):
        await trio.sleep(0.1)
    return picture


async def test_a_picture_of_it(bench: Bench, plan: VmPlan) -> None:
    async with bench.open(plan, cores=(0,)) as instance:
        with trio.fail_after(LIMIT_S):
            picture = await wait_for_picture(instance)
    assert picture.startswith(PNG)
    assert picture.endswith(b"IEND\xaeB`\x82")
    bench.assert_nothing_left()


async def test_viewers_are_let_in_also_by_a_daemon_that_comes_later(bench: Bench, plan: VmPlan) -> None:
    async def look(path: Path) -> trio.SocketStream:
        stream = await trio.open_unix_socket(str(path))
        assert await stream.receive_some(len(HELLO)) == HELLO
        return stream

    async with bench.open(plan, cores=(0,)) as instance:
        path = instance.files.vnc
        with trio.fail_after(LIMIT_S):
            while not path.exists():
                await trio.sleep(0.05)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            first, second = await look(path), await look(path)
            before = path.stat().st_ctime_ns
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_screen, instance._qmp, path)
                while not path.exists() or path.stat().st_ctime_ns == before:
                    await trio.sleep(0.05)
                # Those who look are not disturbed.
                await first.send_all(HELLO)
                assert await first.receive_some(100)
                await second.aclose()
                await (await look(path)).aclose()
                nursery.cancel_scope.cancel()
            await first.aclose()


async def test_a_machine_without_a_screen(bench: Bench) -> None:
    async with bench.open(bench.plan()) as instance:
        with pytest.raises(NotFoundError, match="has no screen"):
            await instance.screenshot()
        assert not instance.files.vnc.exists()


@pytest.fixture(scope="module")
def drawing(world: World) -> Iterator[World]:
    """A world in which a childhurd starts for ever: nobody is there who takes its secrets."""
    world.cache = world.root / "cache"
    folder = world.root / "config/offload"
    for name in ("machines", "images"):
        (folder / name).mkdir(parents=True)
    disk(folder / "images/drawing.img")
    (folder / "images/drawing.yaml").write_text("kind: file\nname: drawing\npath: drawing.img\nformat: raw\n")
    text = "kind: childhurd\nname: drawing2\nid: 2\nimage: drawing\nmemory-size: 128\nport-forwardings: {0: 22}\n"
    (folder / "machines/drawing2.yaml").write_text(text.replace("{0: 22}", f"{{{free_port()}: 22, {free_port()}: 1004}}"))
    starting = world.start("vm", "start", "drawing2")
    socket_path = world.instances / "drawing2/vnc.sock"
    deadline = time.monotonic() + LIMIT_S
    while not socket_path.exists():
        assert starting.poll() is None, starting.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield world
    world.run("vm", "stop", "drawing2")
    _, said = starting.communicate(timeout=LIMIT_S)
    assert "waiting for its secret service" in said


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_screenshot(drawing: World) -> None:
    file = drawing.root / "shot.png"
    drawing.run("vm", "screenshot", "drawing2", "-o", file)
    assert file.read_bytes().startswith(PNG)
    drawing.run("vm", "screenshot", "drawing2")
    assert (drawing.root / "drawing2.png").read_bytes().startswith(PNG)
    assert "no such file" in drawing.run("vm", "screenshot", "drawing2", "-o", "/none/a.png", status=75).stderr.lower()
    assert "does not run" in drawing.run("vm", "screenshot", "build-vm", status=5).stderr


def test_where_its_screen_is(drawing: World) -> None:
    path = Path(drawing.run("vm", "vnc", "drawing2", "--print").stdout.strip())
    assert path == drawing.instances / "drawing2/vnc.sock"
    assert "does not run" in drawing.run("vm", "vnc", "build-vm", status=5).stderr


def test_a_viewer_is_started_where_there_is_a_display(drawing: World, tmp_path: Path) -> None:
    viewer = tmp_path / "vncviewer"
    viewer.write_text(
        f"#!{sys.executable}\nimport socket, sys\nhost, port = sys.argv[1].split('::')\n"
        f"said = socket.create_connection((host, int(port))).recv(12)\n"
        f"open({str(tmp_path / 'seen')!r}, 'wb').write(said)\nsys.exit(3)\n"
    )
    viewer.chmod(0o755)
    environment = drawing.env | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DISPLAY": ":7"}
    command = [sys.executable, "-m", "offload_cli", "vm", "vnc", "drawing2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "seen").read_bytes() == HELLO
    assert "ended with status 3" in done.stderr
    del environment["DISPLAY"]
    environment.pop("WAYLAND_DISPLAY", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"vncviewer {drawing.instances}/drawing2/vnc.sock" in done.stdout


def test_a_port_for_viewers_of_ours_alone(drawing: World) -> None:
    port = free_port()
    relay = drawing.start("vm", "vnc", "drawing2", "--listen", str(port))
    assert relay.stderr is not None
    try:
        assert f"127.0.0.1:{port}" in relay.stderr.readline()
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as viewer:
            assert viewer.recv(len(HELLO), socket.MSG_WAITALL) == HELLO
        taken = drawing.run("vm", "vnc", "drawing2", "--listen", str(port), status=75).stderr
        assert "cannot listen: Address already in use" in taken
        if os.geteuid() == 0:
            assert _hello_for_nobody(port) == b""
            assert "turned away a program of user 65534" in relay.stderr.readline()
    finally:
        relay.send_signal(signal.SIGINT)
        relay.communicate(timeout=LIMIT_S)
    assert relay.returncode == 130


def _hello_for_nobody(port: int) -> bytes:
    """What another user gets."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setuid(65534)
        with socket.socket() as viewer:
            viewer.settimeout(LIMIT_S)
            viewer.connect(("127.0.0.1", port))
            os.write(writer, viewer.recv(len(HELLO)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        answer = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return answer


def test_secrets_of_a_machine_that_runs_stay(drawing: World) -> None:
    before = drawing.json("secrets", "show", "drawing2")
    refused = drawing.run("secrets", "rotate", "drawing2", "--yes", status=6).stderr
    assert "drawing2: runs with these secrets" in refused
    assert "offload vm stop drawing2" in refused
    assert drawing.json("secrets", "show", "drawing2") == before
    # Nor by way of another machine that has the same ones.
    drawing.machine("sharing", f"secret-root: {before['root']}\n")
    refused = drawing.run("secrets", "rotate", "sharing", "--yes", status=6).stderr
    assert "drawing2: runs with these secrets" in refused
    assert drawing.json("secrets", "show", "drawing2") == before
    (drawing.root / "config/offload/machines/sharing.yaml").unlink()


def test_secrets_of_one_that_does_not(drawing: World) -> None:
    """Made, shown as ssh-keygen shows them, exchanged; never printed."""
    assert "no secrets yet" in drawing.run("secrets", "show", "build-vm").stderr
    made = drawing.json("secrets", "init", "build-vm")["made"]
    assert sum("ssh_host_" in path for path in made) == 4
    assert "nothing to do" in drawing.run("secrets", "init", "build-vm").stderr
    shown = fingerprints(drawing.json("secrets", "show", "build-vm"))
    for path, found in shown.items():
        told = subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, text=True, check=True).stdout
        assert found == [told.split()[1]]
    private = next(path for path in made if path.endswith("ssh_host_ed25519_key"))
    secret = Path(private).read_text().splitlines()[2]
    for command in (["show"], ["show", "--json"], ["rotate", "--yes"]):
        done = drawing.run("secrets", command[0], "build-vm", *command[1:])
        assert secret not in done.stdout + done.stderr
        assert "SHA256:" in done.stdout
    old = re.search(r"the old ones are in (\S+)", clean(done.stderr))
    assert old is not None
    assert secret in (Path(old[1]) / "ssh_host_ed25519_key").read_text()
    now = fingerprints(drawing.json("secrets", "show", "build-vm"))
    assert now.keys() == shown.keys()
    assert not [path for path in now if now[path] == shown[path]]
    assert secret not in (drawing.state / "offloadd.log").read_text()


def fingerprints(view: dict[str, Any]) -> dict[str, list[str]]:
    rows = [*view["files"], *view["client"]]
    return {row["path"]: row["fingerprints"] for row in rows if row["fingerprints"]}


def test_rotation_asks(drawing: World) -> None:
    assert "--yes" in drawing.run("secrets", "rotate", "build-vm", status=2).stderr
    assert "no such kind" in drawing.run("secrets", "rotate", "build-vm", "--only", "all", "--yes", status=2).stderr
    refused = drawing.run("secrets", "rotate", "build-vm", "--only", "guix", "--yes", status=2).stderr
    assert "has no secrets of the kind guix" in refused
    assert "is no virtual machine" in drawing.run("secrets", "show", "local", status=2).stderr
