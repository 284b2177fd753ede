"""A machine that its user starts, uses and stops."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offloadd.guix.read import read_guix
from tests.conftest import World

SSH = 13022
SMALL = "cpu-count: 2\nmemory-size: 512\n"


@pytest.fixture(scope="module")
def started(world: World) -> Iterator[World]:
    """build-vm, as it is shipped but for its ports, which the one who runs the tests may be using, and for whom it builds."""
    world.machine("build-vm", f"port-forwardings: {{{SSH}: 22}}\ndaemons: [guix]\n")
    world.run("vm", "start", "build-vm")
    yield world
    world.run("vm", "stop", "build-vm")
    world.assert_nothing_left()


def test_has_the_date_of_its_file(started: World) -> None:
    seen = int(started.run("vm", "exec", "build-vm", "--", "date", "+%s").stdout)

    # It came up at 2020-01-01 and has run since the test began.
    assert 1577836800 <= seen < 1577836800 + 600


def test_its_clock_is_shifted_on_purpose(started: World) -> None:
    row = next(row for row in started.json("machine", "status") if row["name"] == "build-vm")
    assert 1577836800 <= row["clock"] < 1577836800 + 600
    # An emulated guest may take some seconds to answer; a shift would be of years.
    assert abs(row["off_s"]) < 30
    line = next(line for line in started.run("machine", "status").stdout.splitlines() if line.startswith("build-vm "))
    assert "2020-01-01T00:" in line
    assert "shifted on purpose by -" in line


def test_guix_is_told_of_it_as_it_runs(started: World) -> None:
    text = started.run("machine", "export", "--format", "guix", "--running").stdout
    ((_, offer),) = read_guix(text, "machines.scm")
    assert (offer.host, offer.port, offer.user) == ("127.0.0.1", SSH, "offloading")
    login = ["ssh", "-F", "none", "-p", str(SSH), "-i", offer.private_key, "-o", "BatchMode=yes"]
    known = started.root / "known_hosts"
    known.write_text(f"[127.0.0.1]:{SSH} {offer.host_key}\n")
    login += [
        "-o",
        f"UserKnownHostsFile={known}",
        "-o",
        "HostKeyAlgorithms=ssh-ed25519",
        f"{offer.user}@{offer.host}",
        "id",
        "-un",
    ]
    assert subprocess.run(login, capture_output=True, text=True, timeout=60).stdout == "offloading\n"


def test_account_is_unprivileged(started: World) -> None:
    assert started.run("vm", "exec", "build-vm", "--", "id", "-un").stdout == "offloading\n"
    done = started.run("vm", "exec", "build-vm", "--", "sudo", "-n", "id", status=None)
    assert done.returncode != 0


def test_exec_gives_the_commands_exit_status(started: World) -> None:
    started.run("vm", "exec", "build-vm", "--", "sh", "-c", "exit 7", status=7)


def test_show_tells_what_runs(started: World) -> None:
    shown = started.json("vm", "show", "build-vm")

    assert shown["state"] == "running"
    assert shown["instance"]["cpu"] == "Cascadelake-Server"
    assert shown["instance"]["ports"] == {"22": SSH}
    assert len(shown["instance"]["cores"]) == 4
    if shown["instance"]["accelerator"] == "tcg":
        # What TCG of this QEMU cannot give of that model.
        assert "avx512f" in shown["instance"]["missing_cpu_features"]
    assert started.json("vm", "list")[0]["state"] == "running"


def test_threads_are_pinned_as_show_says(started: World) -> None:
    shown = started.json("vm", "show", "build-vm")["instance"]

    threads = {}
    for task in Path(f"/proc/{shown['pid']}/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("CPU "):
            threads[int(name.split()[1].split("/")[0])] = os.sched_getaffinity(int(task.name))
    cores = shown["cores"]
    # Four on fewer cores share them: tied to one each, two that are busy could meet on one.
    alone = len(set(cores)) == len(cores)
    assert threads == {index: {core} if alone else set(cores) for index, core in enumerate(cores)}


def test_nobody_else_may_use_its_sockets(started: World) -> None:
    folder = started.instances / "build-vm"

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    sockets = [path for path in folder.iterdir() if stat.S_ISSOCK(path.stat().st_mode)]
    assert {path.name for path in sockets} == {"qmp.sock", "console.sock", "agent.sock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in sockets} == {0o600}


def test_forwards_are_on_loopback_alone(started: World) -> None:
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    local = [line.split()[1] for line in listening if line.split()[3] == "0A"]
    assert f"0100007F:{SSH:04X}" in local
    assert f"00000000:{SSH:04X}" not in local


def test_guest_cannot_reach_the_hosts_loopback(started: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"import socket; socket.create_connection(('10.0.2.2', {port}), 3)"
        done = started.run("vm", "exec", "build-vm", "--", "python3", "-c", script, status=None)
    assert done.returncode != 0
    assert "Error" in done.stderr


def test_qemu_is_in_its_sandbox(started: World) -> None:
    pid = started.json("vm", "show", "build-vm")["instance"]["pid"]
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Seccomp:\t2" in status


def test_build_that_keeps_the_machine_uses_the_running_one(started: World, tmp_path: Path) -> None:
    recipe = started.recipe("shared", "steps: ['id -u; echo $HOME; date +%Y', 'ls /sys/class/net || true']\n")
    result = started.json("build", "--machine", "build-vm", "--keep-machine", "-o", tmp_path / "out", recipe)

    assert (result["own_vm"], result["guest"], result["instance"]) == (False, "kept", "build-vm")
    log = started.run("log", result["build"]).stdout
    assert "1000\n/build\n2020\n" in log


def test_build_does_not_touch_the_running_machine(started: World, tmp_path: Path) -> None:
    recipe = started.recipe("apart", "steps: ['cat /proc/sys/kernel/random/boot_id; date +%Y']\n")
    running = started.json("vm", "show", "build-vm")["instance"]["pid"]
    result = started.json("build", "--machine", "build-vm", "-o", tmp_path / "out", recipe)

    assert (result["own_vm"], result["guest"]) == (True, "clone")
    assert result["instance"] != "build-vm"
    assert started.json("vm", "show", "build-vm")["instance"]["pid"] == running
    assert started.qemus() == [running]


def test_keeping_a_machine_that_is_another_than_the_build_asks_for(started: World, tmp_path: Path) -> None:
    recipe = started.recipe("elsewhen", "steps: ['true']\n")
    options = ["--machine", "build-vm", "--keep-machine", "--cpu", "Nehalem"]
    done = started.run("build", *options, "-o", tmp_path / "out", recipe, status=None)

    assert done.returncode in (2, 4), done.stderr
    assert "--keep-machine" in done.stderr
    assert started.json("vm", "show", "build-vm")["state"] == "running"


def test_build_with_another_date_gets_its_own_vm(started: World, tmp_path: Path) -> None:
    recipe = started.recipe("own", "steps: ['date +%Y-%m-%d']\ndate: 2012-03-04\n")
    result = started.json("build", "-o", tmp_path / "out", recipe)

    assert result["own_vm"] is True
    assert result["cpu"] == "SandyBridge"
    assert "2012-03-04\n" in started.run("log", result["build"]).stdout


def test_second_machine_on_its_ports_is_told_whose_they_are(started: World) -> None:
    started.machine("rival", SMALL + f"port-forwardings: {{{SSH}: 22}}\n")
    done = started.run("vm", "start", "rival", status=75)

    assert f"port {SSH} is taken by our machine build-vm" in done.stderr
    assert "offload vm stop build-vm" in done.stderr


def test_machines_side_by_side_have_their_own_cores(started: World) -> None:
    started.machine("beside", SMALL + "port-forwardings: {12022: 22}\n")
    started.run("vm", "start", "beside")
    try:
        cores = started.json("vm", "show", "beside")["instance"]["cores"]
        assert set(cores) <= os.sched_getaffinity(0)
        seen = started.run("vm", "exec", "beside", "--", "nproc").stdout
        assert seen == "2\n"
    finally:
        started.run("vm", "stop", "beside")


def test_a_machine_whose_file_is_taken_away_while_it_runs(world: World) -> None:
    world.machine("orphan", SMALL + "port-forwardings: {13122: 22}\n")
    world.run("vm", "start", "orphan")
    try:
        (world.root / "config/offload/machines/orphan.yaml").unlink()
        rows = {row["name"]: row for row in world.json("vm", "list")}
        assert (rows["orphan"]["state"], rows["orphan"]["ssh_port"]) == ("running", 13122)
        assert world.json("vm", "show", "orphan")["instance"]["pid"] in world.qemus()
        world.run("vm", "exec", "orphan", "--", "true")
    finally:
        assert world.json("vm", "stop", "orphan")["state"] == "stopped"
    assert "orphan" not in {row["name"] for row in world.json("vm", "list")}


def test_configuration_is_what_the_manual_says(make_world: Callable[[], World]) -> None:
    shown = make_world().json("vm", "configuration", "build-vm")
    assert shown["cpu-count"] == 4
    assert shown["memory-size"] == 2048
    assert shown["date"] == "2020-01-01T00:00:00Z"
    assert shown["port-forwardings"] == {"11022": 22}


def test_log_of_the_console_is_kept(started: World) -> None:
    assert "Server listening on 0.0.0.0 port 22" in started.run("vm", "logs", "build-vm").stdout


def test_openssh_gets_in_with_the_host_key_that_we_sent(started: World) -> None:
    shown = started.json("vm", "show", "build-vm")
    scanned = subprocess.run(
        ["ssh-keyscan", "-t", "ed25519", "-p", str(SSH), "127.0.0.1"], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown["host_keys"][0].split()[1] in scanned.stdout
