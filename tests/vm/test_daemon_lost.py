"""A daemon that is killed, and the next one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import World
from tests.vm.test_build import wait_until_building

SMALL = "cpu-count: 2\nmemory-size: 512\n"


def kill_daemon(world: World) -> None:
    (daemon,) = world.daemons()
    os.kill(daemon, signal.SIGKILL)
    while world.daemons():
        time.sleep(0.05)


def test_next_daemon_adopts_a_users_machine(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.machine("lasting", SMALL + "port-forwardings: {12522: 22}\n")
    world.run("vm", "start", "lasting")
    pid = world.json("vm", "show", "lasting")["instance"]["pid"]
    kill_daemon(world)
    assert world.qemus() == [pid]

    # The adoption needs a moment: a login.
    deadline = time.monotonic() + 60
    while not (shown := world.json("vm", "show", "lasting"))["client_key"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert shown["state"] == "running"
    assert shown["instance"]["pid"] == pid
    assert world.run("vm", "exec", "lasting", "--", "date", "+%Y").stdout == "2020\n"
    world.run("vm", "stop", "lasting")
    world.assert_nothing_left()
    assert world.json("vm", "show", "lasting")["state"] == "stopped"


def test_next_daemon_ends_a_builds_machine(make_world: Callable[[], World], tmp_path: Path) -> None:
    world = make_world()
    recipe = world.recipe("orphaned", "steps: ['sleep 600']\n")
    process = world.start("build", "--machine", "build-vm", "-o", tmp_path / "out", recipe)
    wait_until_building(process)
    kill_daemon(world)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert world.qemus()

    (row,) = world.json("builds")
    assert row["state"] == "errored"
    world.assert_nothing_left()


def test_sigterm_ends_builds_and_machines(make_world: Callable[[], World], tmp_path: Path) -> None:
    world = make_world()
    world.machine("ending", SMALL + "port-forwardings: {12622: 22}\n")
    world.run("vm", "start", "ending")
    recipe = world.recipe("ended", "steps: ['sleep 600']\ndate: 2018-01-01\n")
    process = world.start("build", "--machine", "ending", "-o", tmp_path / "out", recipe)
    wait_until_building(process)
    (daemon,) = world.daemons()
    os.kill(daemon, signal.SIGTERM)

    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "the daemon was stopped" in err
    deadline = time.monotonic() + 60
    while world.daemons() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not world.daemons()
    world.assert_nothing_left()
