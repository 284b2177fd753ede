"""Seeing that a build hangs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from offloadd.errors import BuildFailedError, EmulatorFault
from offloadd.place import stuck
from offloadd.place.stuck import processor_time, watch_stuck


async def watch(
    monkeypatch: pytest.MonkeyPatch, cpu: Callable[[float], float | None], *, last_output: float = 0.0, end_s: float = 3000.0
) -> float | None:
    """Seconds after which it was seen that the build hangs; None: it was not."""
    began = trio.current_time()

    async def run_sync(function: object, pid: int) -> float | None:
        return cpu(trio.current_time() - began)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    with trio.move_on_after(end_s), pytest.raises(EmulatorFault, match="no output and no processor time for 5m"):
        await watch_stuck(1, 300.0, lambda: began + last_output)
        raise AssertionError("it ended")
    passed = trio.current_time() - began
    return passed if passed < end_s else None


def idle(_: float) -> float:
    return 1.0


async def test_nothing_moves(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    seen = await watch(monkeypatch, idle)
    assert seen == pytest.approx(315, abs=16)


async def test_output_puts_it_off(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    seen = await watch(monkeypatch, idle, last_output=1000.0)
    assert seen == pytest.approx(1300, abs=16)


@pytest.mark.parametrize(
    ("cpu", "hangs"),
    [
        (lambda t: t / 2, False),
        # A tenth of a second now and then is work.
        (lambda t: t // 200 * 0.1, False),
        # The timers of an emulator that waits: 10 ms a minute.
        (lambda t: t / 60 * 0.010, True),
        (lambda t: 100.0 if t < 500 else 3.0, True),
        # What cannot be seen is not said to hang.
        (lambda t: None, False),
    ],
)
async def test_processor_time(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, cpu: Callable[[float], float | None], hangs: bool
) -> None:
    assert (await watch(monkeypatch, cpu) is not None) == hangs


def test_the_fault_is_a_failed_build() -> None:
    """Whoever knows nothing of emulators sees a build that failed."""
    assert issubclass(EmulatorFault, BuildFailedError)
    assert EmulatorFault.exit_status == 1
    assert stuck.LEAST_CPU_S < 0.1


def test_the_time_of_processes_that_ended_counts() -> None:
    busy = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done"
    script = f"sh -c '{busy}'; sleep 1000 & sleep 1000 & echo ready; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            before: float | None = -1.0
            used = processor_time(process.pid)
            while used != before:  # those that it has just started are not asleep yet
                time.sleep(0.1)
                before, used = used, processor_time(process.pid)
            assert used is not None
            assert 0 < used < 60
        finally:
            os.killpg(process.pid, 9)


def test_a_family_without_children_is_not_seen() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            assert processor_time(process.pid) is None
        finally:
            process.kill()
