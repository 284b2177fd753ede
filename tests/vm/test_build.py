"""What goes wrong in a build, and what is left of it: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import World

SMALL = "cpu-count: 2\nmemory-size: 512\n"


def wait_for(condition: Callable[[], object], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_until_building(process: subprocess.Popen[str]) -> None:
    """Until its first step runs, as the command line says."""
    assert process.stderr is not None
    for line in process.stderr:
        if "[1/" in line:
            return
    raise AssertionError("the build did not begin")


def test_command_on_the_command_line(world: World, tmp_path: Path) -> None:
    project = tmp_path / "hello"
    project.mkdir()
    (project / "greeting").write_text("hello from the host\n")

    done = world.run(
        "build", "--date", "2015-05-05", "-o", tmp_path / "out", project, "--", "sh", "-c", "cat greeting; date +%F"
    )

    assert done.stdout == "hello from the host\n2015-05-05\n"


ENDS_OF_THE_CLOCK = ["1970-01-01", "1985-06-01", "2038-06-01", "2069-12-31"]


@pytest.mark.parametrize("date", ENDS_OF_THE_CLOCK)
def test_dates_at_the_ends_of_the_clock(world: World, tmp_path: Path, date: str) -> None:
    recipe = world.recipe(f"at-{date}", "steps: ['date +%F']\n")

    assert world.run("build", "--date", date, "-o", tmp_path / "out", recipe).stdout == f"{date}\n"
    record = json.loads((tmp_path / "out/build.json").read_text())
    assert record["guest"] in ("clone", "warm"), record


@pytest.mark.parametrize("date", ENDS_OF_THE_CLOCK)
def test_a_boot_at_the_ends_of_the_clock(world: World, tmp_path: Path, date: str) -> None:
    world.machine("booted", SMALL + "template: false\n")
    recipe = world.recipe(f"booted-at-{date}", "steps: ['date +%F']\n")

    done = world.run("build", "--machine", "booted", "--date", date, "-o", tmp_path / "out", recipe)
    assert done.stdout == f"{date}\n"
    record = json.loads((tmp_path / "out/build.json").read_text())
    assert record["guest"] == "boot"
    # The machine itself came up at that date too.
    console = (world.state / "builds" / record["build"] / "console.log").read_text()
    assert f"offload-init: {date}T00:0" in console


def test_sandbox_of_a_build(world: World, tmp_path: Path) -> None:
    steps = [
        "test $(id -u) = 1000",
        "test $(ls /proc | grep -c '^[0-9]') -lt 10",
        "! touch /etc/x 2>/dev/null",
        "! (exec 3<>/dev/tcp/10.0.2.2/80) 2>/dev/null",
        "test \"$(cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' ')\" = lo",
        'test "$GREETING" = hello',
        "test $(stat -c %Y input) -le $(date +%s)",
        "mkdir -p out/deep && echo made > out/deep/file && ln -s file out/deep/link",
    ]
    rest = "outputs: [out]\nenv: {GREETING: hello}\ndate: 2016-01-01\n"
    recipe = world.recipe("sandbox", f"steps: {json.dumps(steps)}\n{rest}")
    (recipe / "input").write_text("newer than the guest's clock")

    world.run("build", "--machine", "build-vm", "-o", tmp_path / "result", recipe)

    assert (tmp_path / "result/out/deep/file").read_text() == "made\n"
    assert (tmp_path / "result/out/deep/link").readlink() == Path("file")
    world.assert_nothing_left()


def test_failed_build_is_kept_when_asked(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("broken", "steps: ['echo partial > made-by-step', 'exit 3']\n")

    done = world.run("build", "--machine", "build-vm", "--keep-failed", "-o", tmp_path / "out", recipe, status=1)

    assert "step 2 of 2 failed with exit status 3" in done.stderr
    assert (tmp_path / "out/failed/made-by-step").read_text() == "partial\n"


def test_missing_outputs_fail_the_build(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("empty-handed", "steps: ['true']\noutputs: [dist/*.whl]\n")

    done = world.run("build", "--machine", "build-vm", "-o", tmp_path / "out", recipe, status=1)

    assert "dist/*.whl" in done.stderr


def test_time_limits(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("endless", "steps: ['while sleep 0.2; do echo alive; done']\n")
    done = world.run("build", "--machine", "build-vm", "--timeout", "3s", "-o", tmp_path / "out", recipe, status=124)
    assert "took longer than 3.0s" in done.stderr

    silent = world.recipe("silent", "steps: ['echo before; sleep 600']\n")
    done = world.run("build", "--machine", "build-vm", "--max-silent-time", "2s", "-o", tmp_path / "out2", silent, status=124)
    assert "no output for 2.0s" in done.stderr
    world.assert_nothing_left()


def test_interrupted_build_leaves_nothing(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("interrupted", "steps: ['sleep 600']\n")
    process = world.start("build", "--machine", "build-vm", "-o", tmp_path / "out", recipe)
    wait_until_building(process)
    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=60) == 130
    world.assert_nothing_left()
    assert world.json("builds")[0]["state"] == "cancelled"


def test_build_cancelled_on_a_running_machine_leaves_it_clean(world: World, tmp_path: Path) -> None:
    world.machine("shared", "cpu-count: 2\nmemory-size: 512\nport-forwardings: {12422: 22}\n")
    world.run("vm", "start", "shared")
    try:
        recipe = world.recipe("cancelled", "steps: ['sleep 12345 & sleep 600']\n")
        process = world.start("build", "--machine", "shared", "--keep-machine", "-o", tmp_path / "out", recipe)
        wait_until_building(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130

        def processes() -> str:
            look = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
            return world.run("vm", "exec", "shared", "--", "sh", "-c", look).stdout

        wait_for(lambda: "12345" not in processes(), 30)
        # The machine takes the next build as if nothing had been.
        following = world.recipe("next", "steps: ['true']\n")
        world.run("build", "--machine", "shared", "--keep-machine", "-o", tmp_path / "next", following)
        assert json.loads((tmp_path / "next/build.json").read_text())["guest"] == "kept"
        # Nobody but root may look into it, but its links tell how many directories are in there.
        count = ("vm", "exec", "shared", "--", "stat", "-c", "%h", "/var/lib/offload/builds")
        wait_for(lambda: world.run(*count).stdout.strip() == "2", 30)
    finally:
        world.run("vm", "stop", "shared")


@pytest.mark.parametrize(("template", "last_words"), [("true", ""), ("false", "offload-init: ready")])
def test_machine_killed_in_mid_build(world: World, tmp_path: Path, template: str, last_words: str) -> None:
    world.machine("doomed", SMALL + f"template: {template}\n")
    recipe = world.recipe(f"bereft-{template}", "steps: ['sleep 600']\n")
    process = world.start("build", "--machine", "doomed", "-o", tmp_path / "out", recipe)
    wait_until_building(process)
    (qemu,) = world.qemus()
    # A busy serial port may have it only now.
    wait_for(lambda: [log for log in world.instances.glob("*/console.log") if last_words in log.read_text()])
    os.kill(qemu, signal.SIGKILL)

    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "killed by SIGKILL" in err
    assert "Traceback" not in out + err
    world.assert_nothing_left()
    # Its console is kept with the build.
    build = world.json("builds")[0]["build"]
    assert last_words in (world.state / "builds" / build / "console.log").read_text()


def test_builds_take_turns_on_a_machine(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("turns", "steps: ['true']\n")
    first, second = (
        world.start("build", "--machine", "build-vm", "-o", tmp_path / name, recipe) for name in ("first", "second")
    )

    for process in (first, second):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    ends = [row for row in world.json("builds") if row["name"] == "turns"]
    assert {row["state"] for row in ends} == {"succeeded"}
    world.assert_nothing_left()
