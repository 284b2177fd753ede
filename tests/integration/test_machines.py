"""`offload machine ...`, the real command line and the real daemon."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ..conftest import World
from .real_sshd import SSHD
from .test_remote import Remote, start, stop
from .test_ssh import free_port


@pytest.fixture(scope="module")
def tower() -> Iterator[Remote]:
    """An sshd with a home of its own."""
    if SSHD is None:
        pytest.skip("openssh-server is not installed")
    folder = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    made = start(folder, pwd.getpwuid(os.geteuid()).pw_name, folder)
    yield made
    stop(made)
    shutil.rmtree(folder)


def declare(world: World, name: str, *, port: int, key: Path, host_key: str, **values: str) -> None:
    """A remote machine of the user's."""
    folder = world.root / "config/offload/machines"
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"host": "127.0.0.1", "port": str(port), "user": pwd.getpwuid(os.geteuid()).pw_name, **values}
    text = f"kind: ssh\nsystems: [x86_64-linux]\nhost-key: {host_key}\nprivate-key: {key}\n"
    (folder / f"{name}.yaml").write_text(text + "".join(f"{field}: {value}\n" for field, value in fields.items()))


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World], tower: Remote) -> World:
    """A world with a remote machine that works, and one that does not."""
    made = make_world()
    key = Path(tower.machine.private_key)
    declare(made, "tower", port=tower.machine.port, key=key, host_key=tower.machine.host_key)
    declare(made, "ruin", port=free_port(), key=key, host_key=tower.machine.host_key)
    return made


def row(world: World, name: str) -> dict[str, Any]:
    return next(row for row in world.json("machine", "list") if row["name"] == name)


def restart(world: World) -> None:
    world.stop_daemon()
    assert not world.daemons()


def test_all_kinds_are_listed(world: World) -> None:
    rows = {row["name"]: row for row in world.json("machine", "list")}
    assert {"local", "binfmt", "build-vm", "tower", "ruin"} <= rows.keys()
    assert {rows[name]["kind"] for name in ("local", "binfmt", "build-vm", "tower")} == {"local", "binfmt", "build-vm", "ssh"}
    tower, ruin = rows["tower"], rows["ruin"]
    assert tower["fault"] == ""
    assert tower["load"] >= 0
    assert tower["disk_free"] > 0
    assert tower["state"] is None
    assert "does not answer" in ruin["fault"]
    assert ruin["load"] is None
    assert rows["build-vm"]["state"] == "stopped"
    text = world.run("machine", "list").stdout
    assert "\nruin: does not answer at 127.0.0.1:" in text
    assert next(line for line in text.splitlines() if line.startswith("ruin ")).split()[4] == "unusable"


def test_only_virtual_machines_are_vms(world: World) -> None:
    rows = world.json("vm", "list")
    assert {"build-vm"} <= {row["name"] for row in rows}
    assert all(row["kind"] in ("build-vm", "childhurd", "emulated-vm") for row in rows)
    for words in (("vm", "show", "tower"), ("vm", "start", "tower"), ("vm", "stop", "local"), ("vm", "ssh", "tower")):
        refused = world.run(*words, status=2)
        assert "is no virtual machine" in refused.stderr
        assert f"offload machine show {words[2]}" in refused.stderr


def test_show(world: World) -> None:
    text = world.run("machine", "show", "tower").stdout
    assert text.startswith("tower\n  kind: ssh\n  mode: online\n")
    assert "    host: 127.0.0.1\n" in text
    assert world.json("machine", "show", "tower")["configuration"]["systems"] == ["x86_64-linux"]
    assert "there is no machine called" in world.run("machine", "show", "nobody", status=5).stderr


@pytest.mark.parametrize(("word", "mode"), [("drain", "drained"), ("offline", "offline")])
def test_modes_are_kept_over_restarts(word: str, mode: str, world: World) -> None:
    assert f"tower: {mode}" in world.run("machine", word, "tower").stderr
    assert row(world, "tower")["mode"] == mode
    restart(world)
    assert row(world, "tower")["mode"] == mode
    assert row(world, "local")["mode"] == "online"
    assert world.json("machine", "resume", "tower")["mode"] == "online"
    restart(world)
    assert row(world, "tower")["mode"] == "online"
    assert "there is no machine" in world.run("machine", word, "nobody", status=5).stderr


def test_an_offline_machine_is_not_talked_to(world: World, tower: Remote) -> None:
    calls: list[float] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                calls.append(time.monotonic())
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        declare(
            world, "shy", port=server.getsockname()[1], key=Path(tower.machine.private_key), host_key=tower.machine.host_key
        )
        try:
            assert row(world, "shy")["fault"]
            assert calls
            world.run("machine", "offline", "shy")
            calls.clear()
            shown = row(world, "shy")
            assert (shown["mode"], shown["fault"]) == ("offline", "")
            refused = world.run("machine", "test", "shy", status=6)
            assert "is offline" in refused.stderr
            assert "offload machine resume shy" in refused.stderr
            assert refused.stdout == ""
            assert not calls
            # Who resumes it wants to know at once, whatever was seen before.
            assert world.json("machine", "resume", "shy")["fault"]
            assert calls
        finally:
            (world.root / "config/offload/machines/shy.yaml").unlink()
            server.shutdown(socket.SHUT_RDWR)
    world.run("machine", "show", "shy", status=5)


def test_an_offline_vm_is_not_started(world: World) -> None:
    world.run("machine", "offline", "build-vm")
    assert "is offline" in world.run("vm", "start", "build-vm", status=6).stderr
    world.run("machine", "resume", "build-vm")


def test_resume_closes_the_breaker(world: World) -> None:
    world.run("machine", "list")
    restart(world)
    with closing(sqlite3.connect(world.state / "offload.sqlite")) as database, database:
        until = time.time() + 600
        database.execute("INSERT OR REPLACE INTO breaker (name, failures, open_until) VALUES ('tower', 3, ?)", (until,))
    shown = row(world, "tower")
    assert shown["breaker"] == {"state": "open", "failures": 3, "open_until": pytest.approx(until)}
    assert "breaker open until" in world.run("machine", "list").stdout
    # While it is left alone nobody asks it how it is.
    assert shown["load"] is None
    resumed = world.json("machine", "resume", "tower")
    assert resumed["breaker"]["state"] == "closed"
    assert resumed["load"] is not None


def test_trial_of_a_remote_machine(world: World, tower: Remote) -> None:
    done = world.run("machine", "test", "tower")
    lines = done.stdout.splitlines()
    assert lines[0] == "tower"
    assert all(line.startswith("  ok  ") for line in lines[1:])
    names = [line.split("  ")[-1].strip().partition(":")[0] for line in lines[1:]]
    assert names == [
        *("reach it", "run a command", "send a file and get it back", "clock"),
        *("load", "memory", "disk", "systems", "sandbox", "build"),
    ]
    assert tower.left() == []
    shown = world.json("machine", "test", "tower")
    assert shown["ok"]
    assert [check["name"] for check in shown["checks"]] == names


def test_trial_of_a_machine_that_does_not_answer(world: World) -> None:
    done = world.run("machine", "test", "ruin", status=75)
    assert done.stdout.splitlines()[1].startswith("  failed  reach it: does not answer at")
    assert "hint: " in done.stdout
    assert "ruin: not all is well" in done.stderr
    # The others are tried all the same, and one failure is enough.
    results = world.json("machine", "test", "ruin", "tower", status=75)
    assert [result["ok"] for result in results] == [False, True]
    world.run("machine", "test", "nobody", status=5)


def test_trial_of_this_host(world: World) -> None:
    checks = world.json("machine", "test", "local")["checks"]
    assert [check["name"] for check in checks if check["ok"]] == [
        "look at this host",
        "load",
        "memory",
        "disk",
        "sandbox",
        "build",
    ]


def test_trial_of_user_emulation(world: World) -> None:
    missing = row(world, "binfmt")["missing"]
    done = world.json("machine", "test", "binfmt", status=None)
    tried = [check["name"] for check in done["checks"][5:]]
    systems = [name for name in row(world, "binfmt")["systems"] if name not in missing]
    assert tried == (systems or ["registered"])
    assert done["ok"] == bool(systems)


def test_a_build_on_a_remote_machine(world: World, tower: Remote) -> None:
    source = world.root / "source"
    source.mkdir()
    (source / "a").write_text("content")
    world.run("build", "--machine", "tower", source, "--output", "b", "-o", world.root / "out", "--", "cp", "a", "b")
    assert (world.root / "out/b").read_text() == "content"
    assert tower.left() == []
    world.run("machine", "drain", "tower")
    refused = world.run("build", "--machine", "tower", source, "-o", world.root / "out", "--", "true", status=4)
    assert "drained" in refused.stderr
    world.run("machine", "resume", "tower")
