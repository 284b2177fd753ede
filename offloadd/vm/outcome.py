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

_PANIC = re.compile(
    r"Kernel panic - not syncing: (?P<linux>.{1,200})|^panic [^\s:]{1,100}:\d{1,9}: (?P<mach>.{1,200})", re.MULTILINE
)
"""Linux' kernel/panic.c; GNU Mach's kern/debug.c."""
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
    rebooted: bool = False
    """Whether the guest wanted to start again: QEMU ends instead (-no-reboot)."""

    @property
    def detail(self) -> str:
        """The last words of QEMU and of the guest, for an error's detail."""
        parts = [f"{label}:\n{text}" for label, text in (("qemu", self.stderr), ("console", self.console)) if text]
        return "\n".join(parts)


def find_panic(console: str) -> str | None:
    """What a kernel died of, as it said on its console; None when it did not.

    GNU Mach starts again 20 s after that, as if it had been asked to.
    """
    found = _PANIC.search(console)
    return (found["linux"] or found["mach"]) if found else None


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
    panic = find_panic(console)
    if fault:
        state, reason = MachineState.CRASHED, fault
    elif "GUEST_PANICKED" in names or "guest-panic" in causes or (not asked and panic):
        state, reason = MachineState.CRASHED, f"the guest's kernel panicked{f': {panic}' if panic else ''}"
    elif asked:
        state, reason = MachineState.STOPPED, "stopped by us"
    elif causes and causes[-1].startswith("guest-"):
        word = "rebooted" if causes[-1] == "guest-reset" else "shut down"
        state, reason = MachineState.STOPPED_BY_GUEST, f"{word} from inside the guest"
    elif causes and causes[-1] in ("host-qmp-quit", "host-signal", "host-qmp-system-reset"):
        state, reason = MachineState.CRASHED, f"QEMU was told to end by somebody else ({causes[-1]})"
    else:
        state, reason = MachineState.CRASHED, f"QEMU ended by itself ({_exit_words(exit_status)})"
    rebooted = state is MachineState.STOPPED_BY_GUEST and causes[-1] == "guest-reset"
    last = "\n".join(console.splitlines()[-CONSOLE_LINES:])
    return Outcome(state=state, reason=reason, exit_status=exit_status, stderr=stderr, console=last, rebooted=rebooted)


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
