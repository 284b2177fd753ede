"""The course of one build as the host sees it: its report, its log, its limits and its clock, whatever it comes through.

A guest may be hostile: what it says about the build is taken here in its order alone, bounded, and with the host's own words.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import trio

from offloadd.builder.job import Job, Listener, Report
from offloadd.errors import BuildFailedError, BuildTimeoutError, ProtocolError, SshError
from offloadd.model.quantity import format_date, format_duration
from offloadd.vm.console import clean

PREPARE_S = 900.0
"""For the guest to take the source and to find its disk."""
CLOCK_TOLERANCE_S = 120.0
"""More than a slow guest needs from its boot to the first step, and less than any time trap minds."""
MAX_LOG_BYTES = 1 << 30
_LEAST_LOG_BYTES = 64
"""What any piece of the log counts for: that much of an event is around each, and a guest may send single bytes."""
_LAST_WORDS = 4096


class Course:
    """How far a build is.  Whoever talks to the guest calls its methods as things happen."""

    def __init__(self, job: Job, listener: Listener) -> None:
        self.report = Report(started={})
        self.exited = False
        """Whether its last step is over."""
        self._job = job
        self._listener = listener
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._last_words = b""
        self._step = 0
        self._log_bytes = 0
        self._began = 0.0
        self._limit = trio.CancelScope()
        self._silence = trio.CancelScope()

    @contextmanager
    def limited(self) -> Iterator[None]:
        """The limits of the build, around everything that is waited for; once.

        Raises:
            BuildTimeoutError: it took or was silent for too long.
            SshError: it was not even begun in time.
        """
        self._limit.deadline = trio.current_time() + PREPARE_S
        with self._limit, self._silence:
            yield
            return
        if not self.report.started:
            raise self.broken(f"the guest did not begin the build within {format_duration(PREPARE_S)}", error=SshError)
        if self._silence.cancelled_caught:
            raise BuildTimeoutError(f"no output for {format_duration(self._job.max_silent_s)}", hint="--max-silent-time")
        raise BuildTimeoutError(f"took longer than {format_duration(self._job.timeout_s)}", hint="--timeout")

    def add_error(self, data: bytes) -> None:
        """What the far side says beside the log; its end is told with whatever goes wrong."""
        self._last_words = (self._last_words + data)[-_LAST_WORDS:]

    @property
    def last_words(self) -> str:
        return clean(self._last_words.decode(errors="replace"))

    def log(self, data: bytes) -> None:
        """Some of the log.

        Raises:
            BuildFailedError: it is too long.
        """
        self._log_bytes += max(len(data), _LEAST_LOG_BYTES)
        if self._log_bytes > MAX_LOG_BYTES:
            raise BuildFailedError(f"the build's log is larger than {MAX_LOG_BYTES >> 20} MiB")
        self._silence.deadline = trio.current_time() + self._job.max_silent_s
        if text := self._text.decode(data):
            self._listener.log(text)

    def start(self, facts: dict[str, Any]) -> None:
        """The guest is about to run the first step; `facts` are its own words, with its `clock`.

        Raises:
            ProtocolError: that is not the clock that it should show.
        """
        clock, expected = read_clock(facts), self._job.expected_clock()
        if clock is None or abs(clock - expected) > CLOCK_TOLERANCE_S:
            shown = _shown(facts.get("clock"))
            raise self.broken(f"the guest's clock shows {shown}, not {_shown(expected)}: the build was not started")
        self.report.started = facts
        self.report.clock_start = clock
        self._began = trio.current_time()
        self._limit.deadline = self._began + self._job.timeout_s
        self._silence.deadline = self._began + self._job.max_silent_s
        self._listener.started(self.report)

    def begin_step(self, index: int) -> None:
        """Our own words for it: a guest could send others, and without end.

        Raises:
            ProtocolError: it is not the next one.
        """
        if index != self._step + 1 or index > len(self._job.steps):
            raise self.broken(f"the guest began step {index} after step {self._step}")
        self._step = index
        self._listener.step(index, len(self._job.steps), self._job.steps[index - 1])

    def exit(self, status: int, failed_step: int, facts: dict[str, Any]) -> None:
        """The last step that is to run is over.

        Args:
            failed_step: counts from 1; of no account when `status` is 0.
            facts: the guest's `clock` now.
        Raises:
            ProtocolError: that is no clock.
        """
        if rest := self._text.decode(b"", final=True):
            self._listener.log(rest)
        self.exited = True
        self._silence.deadline = float("inf")
        self.report.duration_s = trio.current_time() - self._began
        self.report.exit_status = status
        self.report.failed_step = failed_step if status else 0
        self._note_clock(facts)
        self._listener.collecting()

    def _note_clock(self, facts: dict[str, Any]) -> None:
        """What was built with a wrong clock is built, but whoever reads the log must know."""
        clock, job = read_clock(facts), self._job
        if clock is None:
            raise self.broken(f"the guest sent the clock {repr(facts.get('clock'))[:100]}")
        expected = job.expected_clock() if job.set_clock is None else (self.report.clock_start or 0) + self.report.duration_s
        self.report.clock_end = clock
        self.report.clock_drift_s = round(clock - expected, 3)
        if abs(self.report.clock_drift_s) > CLOCK_TOLERANCE_S:
            shown = f"{_shown(clock)}, not {_shown(expected)}"
            self._listener.log(f"\noffload: warning: the guest's clock shows {shown} at the end of the build\n")

    @property
    def wants_outputs(self) -> bool:
        """Whether anything is to be brought back."""
        return bool(self._job.outputs) and (self._job.keep_failed or not self.report.exit_status)

    def finish(self) -> None:
        """All that is to come back is here.

        Raises:
            BuildFailedError: of a build that succeeded, outputs are missing.
        """
        if self.report.missing_outputs and not self.report.exit_status:
            names = ", ".join(self.report.missing_outputs)
            what = f"all steps passed, but no file matches the outputs {names}"
            raise BuildFailedError(what, hint="`outputs` in offload.yaml")

    def not_packed(self, why: str) -> BuildFailedError:
        """What a build has left is its own doing: files that it may not read itself, names without end."""
        if status := self.report.exit_status:
            step = f"step {self.report.failed_step} of {len(self._job.steps)} failed with exit status {status}"
            return BuildFailedError(f"{step}, and its directory cannot be sent: {why}")
        return BuildFailedError(f"all steps passed, but the outputs cannot be sent: {why}")

    def broken(self, what: str, *, error: type[ProtocolError] | type[SshError] = ProtocolError) -> ProtocolError | SshError:
        """An error that is the machine's doing, with its last words."""
        return error(what, detail=self.last_words)


def read_clock(facts: dict[str, Any]) -> float | None:
    """Seconds since 1970.  A guest can send anything: NaN, which is neither near nor far, and numbers that no float holds."""
    clock = facts.get("clock")
    if isinstance(clock, bool) or not isinstance(clock, int | float):
        return None
    try:
        seconds = float(clock)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def _shown(moment: object) -> str:
    """A guest's clock as text, whatever the guest has sent."""
    try:
        return format_date(datetime.fromtimestamp(float(moment), UTC))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return repr(moment)[:100]
