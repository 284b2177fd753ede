"""`offload env` against a real daemon, with a real environment in a cache of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from offloadd.environment.recipe import environment_recipe
from offloadd.environment.store import EnvironmentStore
from offloadd.model.quantity import format_date

from ..conftest import World
from .test_local_service import CACHE

RECIPE = environment_recipe("bookworm", "amd64")
DIGEST = RECIPE.digest
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    (folder / "run").mkdir(mode=0o700)
    world = World(folder, folder / "cache")
    found = trio.run(EnvironmentStore(CACHE / "environments").ensure, RECIPE)
    shutil.copytree(found.path.parent, folder / "cache/offload/environments" / DIGEST)
    yield world
    world.close()


def assert_unused(world: World) -> None:
    assert list((world.state / "work").iterdir()) == []


def test_the_list(world: World) -> None:
    (row,) = world.json("env", "list")
    assert (row["digest"], row["system"], row["recipe"]["suite"]) == (DIGEST, "x86_64-linux", "bookworm")
    assert DIGEST[:12] in world.run("env", "list").stdout


@pytest.mark.parametrize("words", [["bookworm"], ["bookworm", "-s", "amd64"], ["bookworm", "-a", "amd64"], [DIGEST[:6]]])
def test_an_environment_that_is_there_is_not_made_again(world: World, words: list[str]) -> None:
    assert world.json("env", "build", *words)["digest"] == DIGEST
    assert f"environment {DIGEST[:12]} is ready: bookworm amd64" in world.run("env", "build", *words).stderr


def test_the_environment_of_a_directory(world: World) -> None:
    project = world.recipe("project", "steps: [make]\nsystems: [x86_64-linux, i686-linux]\n")
    assert world.json("env", "build", project)["digest"] == DIGEST


def test_a_command_in_an_environment(world: World) -> None:
    script = "id -un; pwd; echo $HOME; ls -A /build; touch /build/mine && echo mine; touch /etc/theirs || echo kept; exit 7"
    done = world.run("env", "enter", "bookworm", "--", "sh", "-c", script, status=7)
    assert done.stdout.splitlines() == ["build", "/build", "/build", "mine", "kept"]
    # What was written is gone, also for the next one.
    assert world.run("env", "enter", DIGEST[:8], "--", "ls", "-A", "/build").stdout == ""
    assert_unused(world)


def test_root_in_an_environment(world: World) -> None:
    script = "id -u; touch /etc/mine && chown 33:33 /etc/mine && stat -c %u /etc/mine; grep -c : /proc/net/dev"
    script += "; mount -t tmpfs x /mnt"
    done = world.run("env", "enter", "bookworm", "--root", "--", "sh", "-c", script, status=None)
    assert done.returncode != 0
    assert done.stdout.splitlines() == ["0", "33", "1"]
    assert not (world.cache / "offload/roots" / DIGEST / "root/etc/mine").exists()


def test_the_network_of_the_host(world: World) -> None:
    done = world.run("env", "enter", "bookworm", "--network", "--", "cat", "/etc/resolv.conf")
    resolver = Path("/etc/resolv.conf")
    assert done.stdout == (resolver.read_text() if resolver.exists() else "")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the name of a PC")
def test_a_command_that_is_killed(world: World) -> None:
    world.run("env", "enter", "bookworm", "--", "sh", "-c", "kill -9 $$", status=137)
    assert_unused(world)


def test_a_shell_on_a_terminal(world: World) -> None:
    """With a terminal of its own: keys and job control work, and it is not ours."""
    child, terminal = pty.fork()
    if not child:
        argv = [sys.executable, "-m", "offload_cli", "env", "enter", "bookworm"]
        os.execve(argv[0], argv, world.env)  # noqa: S606
    try:
        read_until(terminal, b"$ ")
        os.write(terminal, b"sleep 1000\n")
        read_until(terminal, b"sleep 1000")
        time.sleep(1)
        os.write(terminal, b"\x03")
        # A terminal drops at an interrupt what was typed before.
        read_until(terminal, b"$ ")
        os.write(terminal, b"echo $((40 + 2)) $(id -un)\nexit 3\n")
        read_until(terminal, b"42 build")
        deadline = time.monotonic() + LIMIT_S
        status = 0
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            assert time.monotonic() < deadline
            read_some(terminal)
        status = os.waitstatus_to_exitcode(done[1])
        assert status == 3
    finally:
        os.close(terminal)
    assert_unused(world)


def read_some(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096) if select.select([terminal], [], [], 0.1)[0] else b""
    except OSError:
        return b""


def read_until(terminal: int, text: bytes) -> None:
    seen, deadline = b"", time.monotonic() + LIMIT_S
    while text not in seen:
        assert time.monotonic() < deadline, seen
        seen += read_some(terminal)


def test_an_environment_in_use_is_not_removed(world: World) -> None:
    shell = world.start("env", "enter", "bookworm", "--", "sh", "-c", "echo ready; exec sleep 1000")
    try:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        done = world.run("env", "rm", DIGEST[:8], status=6)
        assert "is in use" in done.stderr
        age(world)
        assert world.json("env", "gc") == []
    finally:
        shell.terminate()
        shell.communicate(timeout=LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while list((world.state / "work").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert world.json("env", "gc") == [DIGEST]
    assert world.json("env", "list") == []
    assert not (world.cache / "offload/roots" / DIGEST).exists()


def age(world: World) -> None:
    """As if the environment had been made long ago."""
    manifest = world.cache / "offload/environments" / DIGEST / "environment.json"
    facts = json.loads(manifest.read_text())
    facts["made"] = format_date(datetime(2020, 1, 1, tzinfo=UTC))
    manifest.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (["rm", "0000"], 5, "there is no such environment"),
        (["rm", "../x"], 5, "there is no such environment"),
        (["build", "abcdef0123"], 5, "there is no such environment"),
        (["enter", "./nowhere"], 5, "no such directory"),
        (["build", "Bad!"], 2, "the suite"),
        (["build", "bookworm", "-s", "x87_64-linux"], 2, "unknown system type"),
        (["build", "bookworm", "-s", "amd64", "-a", "arm64"], 2, "say the same thing"),
        (["build", "bookworm", "-p", "Not A Package"], 2, "--package"),
    ],
)
def test_what_makes_no_sense(world: World, words: list[str], status: int, what: str) -> None:
    assert what in world.run("env", *words, status=status).stderr


@pytest.mark.parametrize("command", ["list", "build", "enter", "rm", "gc"])
def test_the_help_has_examples(world: World, command: str) -> None:
    assert f"offload env {command}" in world.run("env", command, "--help").stdout
