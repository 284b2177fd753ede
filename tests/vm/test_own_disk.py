"""A machine that boots from a disk which others have made: GRUB, a kernel and an init of its own, and no agent of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import World
from tests.vm.own_disk import make_own_disk

SSH = 12927
DATE = 1577836800
MACHINE = f"image: own\ncpu-count: 2\nmemory-size: 512\nport-forwardings: {{{SSH}: 22}}\ndaemons: [guix, nix]\n"


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> Iterator[World]:
    """A world with such a machine, whose disk is a qcow2 file as `guix system image -t qcow2` makes it."""
    made = make_world()
    ours = made.json("image", "build", "debian")
    images = made.root / "config/offload/images"
    images.mkdir(parents=True)
    make_own_disk(Path(ours["directory"]), images / "own.raw")
    convert = ["qemu-img", "convert", "-O", "qcow2", str(images / "own.raw"), str(images / "own.qcow2")]
    subprocess.run(convert, check=True, timeout=120)
    (images / "own.raw").unlink()
    (images / "own.yaml").write_text("kind: file\npath: own.qcow2\n")
    machines = made.root / "config/offload/machines"
    machines.mkdir()
    (machines / "own.yaml").write_text(f"kind: build-vm\n{MACHINE}")
    yield made
    made.run("vm", "stop", "own", status=None)
    made.assert_nothing_left()
    made.run("image", "rm", "own")


@pytest.fixture(scope="module")
def started(world: World) -> World:
    world.run("vm", "start", "own")
    return world


def test_runs_with_its_own_kernel_and_the_date_of_its_file(started: World) -> None:
    assert DATE <= int(started.run("vm", "exec", "own", "--", "date", "+%s").stdout) < DATE + 600
    words = started.run("vm", "exec", "own", "--", "cat", "/proc/cmdline").stdout.split()
    assert words[0] == "BOOT_IMAGE=/boot/vmlinuz", "GRUB has started it"
    shown = started.json("vm", "show", "own")
    assert (shown["state"], shown["image"]) == ("running", "own")
    assert shown["instance"]["ports"].keys() == {"22", "1004"}
    assert started.run("vm", "ssh", "own", "--", "id", "-un").stdout == "offloading\n"


def test_has_the_files_of_its_secret_root(started: World) -> None:
    root = Path(started.json("vm", "show", "own")["secret_root"])
    name = "etc/ssh/ssh_host_ed25519_key.pub"
    assert started.run("vm", "exec", "own", "--", "cat", f"/{name}").stdout == (root / name).read_text()


def test_its_image_is_listed_and_in_use(started: World) -> None:
    row = next(row for row in started.json("image", "list") if row["name"] == "own" and row["state"] == "ready")
    assert (row["kind"], row["suite"]) == ("file", None)
    shown = started.json("image", "show", "own")
    assert shown["disk"] == {"format": "qcow2", "size": 8590983168}
    assert "own runs on it" in started.run("image", "rm", "own", status=None).stderr


def test_no_build_of_ours_goes_there(started: World, tmp_path: Path) -> None:
    done = started.run("build", "--machine", "own", "--", "true", status=None, cwd=tmp_path)
    assert done.returncode != 0
    assert "no agent of ours: only builds of guix-daemon and nix-daemon go there" in " ".join(done.stderr.split())
    assert "each of its guests is booted" in started.run("template", "build", "own", status=None).stderr


def test_the_next_daemon_finds_it(started: World) -> None:
    before = started.json("vm", "show", "own")["instance"]["pid"]
    [daemon] = started.daemons()
    os.kill(daemon, signal.SIGKILL)
    assert started.json("vm", "show", "own")["instance"]["pid"] == before
    assert started.run("vm", "exec", "own", "--", "echo", "still here").stdout == "still here\n"
    deadline = time.monotonic() + 30
    while started.json("vm", "show", "own")["state"] != "running":
        assert time.monotonic() < deadline


def test_a_daemon_that_dies_while_it_boots_leaves_it_to_the_next(started: World) -> None:
    started.run("vm", "stop", "own")
    starting = started.start("vm", "start", "own")
    log = started.instances / "own/console.log"
    deadline = time.monotonic() + 60
    while "waiting for secrets" not in (log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [daemon] = started.daemons()
    os.kill(daemon, signal.SIGKILL)
    starting.communicate(timeout=60)

    started.run("vm", "start", "own")
    assert started.run("vm", "exec", "own", "--", "echo", "ready").stdout == "ready\n"
    assert len(started.qemus()) == 1
    assert "power button" not in started.run("vm", "stop", "own").stdout


def test_is_tried_by_a_login(world: World) -> None:
    tried = world.json("machine", "test", "own")
    names = [check["name"] for check in tried["checks"]]
    assert names[:4] == ["prepare it", "start it and log in", "run a command", "send a file and get it back"]
    assert tried["checks"][2]["text"].startswith("Linux")
    # No build of ours goes there.
    assert not [name for name in names if "build" in name]
    assert tried["ok"]
