"""Whose doing was the end of a QEMU?"""

from __future__ import annotations

from typing import Any

import pytest

from offloadd.model.state import MachineState
from offloadd.vm.outcome import judge

STOPPED, BY_GUEST, CRASHED = MachineState.STOPPED, MachineState.STOPPED_BY_GUEST, MachineState.CRASHED
PANIC = "[    1.0] Kernel panic - not syncing: Attempted to kill init!"


def shutdown(reason: str) -> dict[str, Any]:
    return {"event": "SHUTDOWN", "data": {"guest": reason.startswith("guest"), "reason": reason}}


POWERDOWN = {"event": "POWERDOWN"}
PANICKED = {"event": "GUEST_PANICKED", "data": {"action": "poweroff"}}


@pytest.mark.parametrize(
    ("events", "asked", "status", "console", "state", "reason"),
    [
        ([POWERDOWN, shutdown("guest-shutdown")], True, 0, "", STOPPED, "stopped by us"),
        ([shutdown("host-qmp-quit")], True, 0, "", STOPPED, "stopped by us"),
        ([], True, -9, "", STOPPED, "stopped by us"),
        ([shutdown("guest-shutdown")], False, 0, "", BY_GUEST, "shut down from inside"),
        ([shutdown("guest-reset")], False, 0, "", BY_GUEST, "rebooted from inside"),
        ([PANICKED, shutdown("guest-reset")], False, 0, "", CRASHED, "panicked"),
        ([shutdown("guest-panic")], False, 0, "", CRASHED, "panicked"),
        ([shutdown("guest-reset")], False, 0, PANIC, CRASHED, "panicked"),
        ([PANICKED], True, 0, "", CRASHED, "panicked"),
        ([POWERDOWN, shutdown("guest-shutdown")], True, 0, PANIC, STOPPED, "stopped by us"),
        ([shutdown("host-qmp-quit")], False, 0, "", CRASHED, "host-qmp-quit"),
        ([shutdown("host-signal")], False, 0, "", CRASHED, "host-signal"),
        ([], False, 0, "", CRASHED, "exit status 0"),
        ([], False, 1, "", CRASHED, "exit status 1"),
        ([], False, -9, "", CRASHED, "killed by SIGKILL"),
        ([], False, -11, "", CRASHED, "killed by SIGSEGV"),
        ([], False, -63, "", CRASHED, "killed by signal 63"),
        ([], False, None, "", CRASHED, "exit status unknown"),
        ([{"event": "SHUTDOWN"}], False, 0, "", CRASHED, "exit status 0"),
    ],
)
def test_the_table(
    events: list[dict[str, Any]], asked: bool, status: int | None, console: str, state: MachineState, reason: str
) -> None:
    outcome = judge(events, asked=asked, exit_status=status, stderr="", console=console)
    assert outcome.state is state
    assert reason in outcome.reason
    assert outcome.exit_status == status


def test_why_the_kernel_panicked_stands_above_a_long_trace() -> None:
    trace = [f"[    1.1] RSP: {number}" for number in range(50)]
    outcome = judge([PANICKED], asked=False, exit_status=0, stderr="", console="\n".join(["login:", PANIC, *trace]))
    assert outcome.reason == "the guest's kernel panicked: Attempted to kill init!"
    assert outcome.console.splitlines() == trace[-20:]


@pytest.mark.parametrize("asked", [False, True])
def test_why_we_had_to_kill_it_comes_first(asked: bool) -> None:
    events = [POWERDOWN, shutdown("guest-shutdown")] if asked else []
    outcome = judge(events, asked=asked, fault="the host's disk is full", exit_status=-9, stderr="", console=PANIC)
    assert (outcome.state, outcome.reason) == (CRASHED, "the host's disk is full")


def test_events_of_a_qemu_that_lies() -> None:
    lies: list[Any] = [7, None, [], {"reason": ["guest-shutdown"]}]
    for data in lies:
        outcome = judge([{"event": "SHUTDOWN", "data": data}], asked=False, exit_status=1, stderr="", console="")
        assert (outcome.state, outcome.reason) == (CRASHED, "QEMU ended by itself (exit status 1)")


def test_the_last_words() -> None:
    outcome = judge([], asked=False, exit_status=1, stderr="qemu: no", console="login:")
    assert outcome.detail == "qemu:\nqemu: no\nconsole:\nlogin:"
    assert judge([], asked=False, exit_status=1, stderr="", console="").detail == ""
