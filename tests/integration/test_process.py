"""Host programs: output, errors, and that nothing of a group is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from offloadd.errors import HostError, ImageError
from offloadd.process import read_program, run_program


def alive(pid: int) -> bool:
    """Whether that process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def wait_gone(pid: int) -> None:
    with trio.fail_after(5):
        while alive(pid):
            await trio.sleep(0.02)


async def test_lines_of_both_streams_arrive_while_it_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "one":
            # Only somebody who got the first line opens the gate.
            os.close(os.open(gate, os.O_WRONLY))

    with trio.fail_after(10):
        await run_program(["sh", "-c", f"echo one; read x <{gate}; echo two >&2; printf three"], on_line=on_line)
    assert lines == ["one", "two", "three"]


async def test_standard_input_is_a_file_or_empty(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("hello\n")
    lines: list[str] = []
    await run_program(["cat"], stdin=tmp_path / "in", on_line=lines.append)
    assert lines == ["hello"]
    assert await read_program(["cat"]) == []


async def test_a_failure_has_the_last_lines() -> None:
    with pytest.raises(ImageError, match="sh failed with status 3") as caught:
        await run_program(["sh", "-c", "seq 100; exit 3"], error=ImageError, subject="image x")
    assert caught.value.subject == "image x"
    assert caught.value.detail.splitlines()[-1] == "100"
    assert len(caught.value.detail.splitlines()) == 15


async def test_who_cannot_take_a_line_ends_the_program() -> None:
    pids: list[int] = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        raise OSError(28, "No space left on device")

    with trio.fail_after(10), pytest.raises(OSError, match="No space left"):
        await run_program(["sh", "-c", "echo $$; sleep 100"], on_line=on_line)
    await wait_gone(pids[0])


async def test_death_by_signal_is_named() -> None:
    with pytest.raises(HostError, match="SIGKILL"):
        await run_program(["sh", "-c", "kill -KILL $$"])


async def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("offloadd.process._ADMINISTRATORS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="sqfstar: not installed") as caught:
        await run_program(["sqfstar"])
    assert "squashfs-tools" in caught.value.hint


async def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    script = "echo 'tar: x: Cannot write: No space left on device'; exit 2"
    with pytest.raises(ImageError, match=f"the disk is full at {tmp_path}"):
        await run_program(["sh", "-c", script], error=ImageError, disk=tmp_path)


async def test_cancelling_ends_the_whole_group() -> None:
    pids: list[int] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            def on_line(line: str) -> None:
                pids.append(int(line))
                if len(pids) == 2:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(lambda: run_program(["sh", "-c", "echo $$; sleep 100 & echo $!; wait"], on_line=on_line))
    assert len(pids) == 2
    for pid in pids:
        await wait_gone(pid)


async def test_who_ignores_sigterm_is_killed() -> None:
    pids: list[int] = []
    started = trio.current_time()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            def on_line(line: str) -> None:
                pids.append(int(line))
                nursery.cancel_scope.cancel()

            script = "trap '' TERM; echo $$; while :; do sleep 1; done"
            nursery.start_soon(lambda: run_program(["sh", "-c", script], on_line=on_line, terminate_limit_s=0.5))
    assert trio.current_time() - started >= 0.5
    await wait_gone(pids[0])


async def test_what_a_program_leaves_behind_is_ended() -> None:
    pids = await read_program(["sh", "-c", "sleep 100 & echo $!"])
    await wait_gone(int(pids[0]))


async def test_someone_in_another_session_does_not_keep_us() -> None:
    pids: list[str] = []
    with trio.fail_after(10):
        await run_program(["sh", "-c", "setsid sh -c 'echo $$; sleep 30' & sleep 2"], on_line=pids.append)
    os.kill(int(pids[0]), 9)


async def test_when_we_are_killed_the_group_dies_too() -> None:
    script = """
import trio
from offloadd.process import run_program
# Like mmdebstrap, it does not care that nobody reads it any more.
program = ["sh", "-c", "trap '' PIPE TERM; echo $$; while :; do sleep 0.1; done"]
trio.run(lambda: run_program(program, on_line=lambda line: print(line, flush=True)))
"""
    repository = str(Path(__file__).parent.parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([repository, *filter(None, sys.path)])}
    argv = [sys.executable, "-c", script]
    ours = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)
    assert ours.stdout is not None
    pid = int(ours.stdout.readline())
    assert alive(pid)
    ours.kill()
    ours.wait(10)
    await wait_gone(pid)
