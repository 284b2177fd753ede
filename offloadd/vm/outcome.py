"""How an instance ended: whose doing was it?

Ganeti's lesson: QEMU's event POWERDOWN and then SHUTDOWN: we did; SHUTDOWN alone: a user inside the guest; neither: a crash.
The reasons are those of QEMU's `ShutdownCause` (qapi/run-state.json).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offloadd.model.state import MachineState

_PANIC = re.compile(r"Kernel panic - not syncing: (.{1,200})")
"""Linux' kernel/panic.c."""
CONSOLE_LINES = 20
"""Of a guest's last words that are kept."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one instance."""

    state: MachineState
    """STOPPED, STOPPED_BY_GUEST or CRASHED."""
    reason: str
    exit_status: int | None
    """QEMU's; negative: killed by that signal; None: unknown, it was adopted."""
    stderr: str
    console: str

    @property
    def detail(self) -> str:
        """The last words of QEMU and of the guest, for an error's detail."""
        parts = [f"{label}:\n{text}" for label, text in (("qemu", self.stderr), ("console", self.console)) if text]
        return "\n".join(parts)


def judge(
    events: Sequence[Mapping[str, Any]], *, asked: bool, exit_status: int | None, stderr: str, console: str, fault: str = ""
) -> Outcome:
    """Tell how an instance ended.

    Args:
        events: QEMU's SHUTDOWN, POWERDOWN and GUEST_PANICKED events.
        asked: we told it to stop.
        console: the guest's last words: all those behind a panic, whose trace is long.
        fault: why we had to kill it.
    """
    names = [event["event"] for event in events]
    causes = [_cause(event.get("data")) for event in events if event["event"] == "SHUTDOWN"]
    panic = _PANIC.search(console)
    if fault:
        state, reason = MachineState.CRASHED, fault
    elif "GUEST_PANICKED" in names or "guest-panic" in causes or (not asked and panic):
        state, reason = MachineState.CRASHED, f"the guest's kernel panicked{f': {panic[1]}' if panic else ''}"
    elif asked:
        state, reason = MachineState.STOPPED, "stopped by us"
    elif causes and causes[-1].startswith("guest-"):
        word = "rebooted" if causes[-1] == "guest-reset" else "shut down"
        state, reason = MachineState.STOPPED_BY_GUEST, f"{word} from inside the guest"
    elif causes and causes[-1] in ("host-qmp-quit", "host-signal", "host-qmp-system-reset"):
        state, reason = MachineState.CRASHED, f"QEMU was told to end by somebody else ({causes[-1]})"
    else:
        state, reason = MachineState.CRASHED, f"QEMU ended by itself ({_exit_words(exit_status)})"
    last = "\n".join(console.splitlines()[-CONSOLE_LINES:])
    return Outcome(state=state, reason=reason, exit_status=exit_status, stderr=stderr, console=last)


def _cause(data: object) -> str:
    """A guest that has broken out sends events of any shape."""
    return str(data.get("reason", "")) if isinstance(data, Mapping) else ""


def _exit_words(status: int | None) -> str:
    if status is None:
        return "exit status unknown"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"
