"""How a machine ends, and what its user is told."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.conftest import World

SMALL = "cpu-count: 2\nmemory-size: 512\n"


def test_killed_qemu_is_a_crash_with_its_signal(world: World) -> None:
    world.machine("victim", SMALL + "port-forwardings: {12122: 22}\n")
    world.run("vm", "start", "victim")
    os.kill(world.json("vm", "show", "victim")["instance"]["pid"], signal.SIGKILL)

    deadline = time.monotonic() + 10
    while (shown := world.json("vm", "show", "victim"))["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shown["state"] == "crashed"
    assert "killed by SIGKILL" in shown["reason"]
    assert "Server listening on" in shown["detail"]
    # A crash is no reason not to start it again.
    world.run("vm", "start", "victim")
    world.run("vm", "stop", "victim")


@pytest.mark.parametrize(
    ("append", "state", "words"),
    [
        pytest.param("root=/dev/none console=ttyS0 panic=-1", "stopped-by-guest", "shut down from inside", id="powers-off"),
        pytest.param("root=/dev/none rdinit=/none console=ttyS0 panic=-1", "crashed", "kernel panicked", id="panics"),
    ],
)
def test_guest_that_ends_while_it_boots(world: World, append: str, state: str, words: str) -> None:
    name = f"guest-{state}"
    forwards = "port-forwardings: {12222: 22}\n"
    world.machine(name, SMALL + forwards + f"options: [-append, '{append}']\n")
    done = world.run("vm", "start", name, status=75)

    assert words in done.stderr
    shown = world.json("vm", "show", name)
    assert words in shown["reason"]
    assert shown["detail"]
    world.assert_nothing_left()


def test_guest_without_a_hello_is_stopped_at_the_limit(world: World) -> None:
    forwards = "port-forwardings: {12322: 22}\n"
    world.machine("mute", SMALL + forwards + "boot-timeout: 6s\noptions: [-append, 'root=/dev/none console=ttyS0']\n")
    done = world.run("vm", "start", "mute", status=75)

    assert "not ready after 6 s: its agent gave no hello" in done.stderr
    assert done.stderr.count("not ready after") == 1
    world.assert_nothing_left()


def test_cpu_that_qemu_does_not_know_is_refused_before_boot(world: World) -> None:
    world.machine("odd", "cpu: Haswel\n")
    done = world.run("vm", "start", "odd", status=4)

    assert "does not know the CPU model 'Haswel'" in done.stderr
    assert "Haswell" in done.stderr
    assert not world.qemus()
