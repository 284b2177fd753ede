"""What is being done now: one line that changes on a terminal, a line for each phase elsewhere."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from offload_cli.terminal import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

_CHANGING = re.compile(r"\([^()]*\)$|\d+")
_EVERY_S = 5.0
_MOMENT_S = 0.5
"""A build that has nothing to do in a fresh clone has said all by then."""


class Phases(Protocol):
    """Where the phases of long work are shown."""

    def tell(self, text: str, fraction: float | None) -> None:
        """Show a phase; `fraction` (0 to 1) is how much of it is done, None when that is not known."""

    def line(self, text: str) -> None:
        """Show a line that stays."""

    def pause(self) -> None:
        """Leave the terminal to others until the next `tell`."""


class PlainPhases:
    """Each phase once, as `==> phase`; of those with a fraction, which go through hundreds of texts, one every few seconds."""

    def __init__(self, name: str = "") -> None:
        """`name` says which of several builds it is about."""
        self._name = f"{name}: " if name else ""
        self._seen: set[str] = set()
        self._told = 0.0

    def tell(self, text: str, fraction: float | None) -> None:
        # What only counts up is the same phase.
        key = _CHANGING.sub("", text) if fraction is None else text.split(" ", 1)[0]
        due = fraction is not None and time.monotonic() - self._told >= _EVERY_S
        if key not in self._seen or due:
            self._seen.add(key)
            self._told = time.monotonic()
            self.line(text if fraction is None or fraction >= 1 else f"{text} ({fraction:.0%})")

    def line(self, text: str) -> None:
        sys.stderr.write(f"==> {self._name}{one_line(text)}\n")
        sys.stderr.flush()

    def pause(self) -> None:
        pass


class LivePhases:
    """The phase with its bar and the time since the beginning, in one line that vanishes at the end.

    It comes when nothing else was shown for a moment: phases that are over before anybody has read them would only flicker.
    """

    def __init__(self, moment_s: float = _MOMENT_S) -> None:
        self._moment_s = moment_s
        self._lock = threading.Lock()
        """Of what follows: the line comes from a thread of its own."""
        self._phase: tuple[str, float | None] = ("", None)
        self._due: threading.Timer | None = None
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def tell(self, text: str, fraction: float | None) -> None:
        with self._lock:
            self._phase = (text, fraction)
            if self._progress is not None:
                self._update(self._progress)
            elif self._due is None:
                self._due = threading.Timer(self._moment_s, self._show)
                self._due.daemon = True
                self._due.start()

    def _show(self) -> None:
        with self._lock:
            # It may have been called off while it waited for the lock.
            if self._due is threading.current_thread():
                self._due = None
                self._progress = make_progress(transient=True)
                self._progress.add_task("", total=None)
                self._progress.tasks[0].start_time = self._began
                self._update(self._progress)
                self._progress.start()

    def _update(self, progress: Progress) -> None:
        text, fraction = self._phase
        # The total None makes a bar that only moves.
        total, completed = (None, 0.0) if fraction is None else (1.0, min(max(fraction, 0.0), 1.0))
        progress.update(progress.task_ids[0], description=one_line(text, 100), total=total, completed=completed)

    def line(self, text: str) -> None:
        self.pause()
        sys.stderr.write(f"==> {one_line(text)}\n")
        sys.stderr.flush()

    def pause(self) -> None:
        with self._lock:
            if self._due is not None:
                self._due.cancel()
                self._due = None
            if self._progress is not None:
                self._progress.stop()
                self._progress = None


def make_progress(*, transient: bool) -> Progress:
    """Lines with a bar and the time since the beginning; with `transient` they vanish at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=transient,
        expand=True,
    )


def is_live() -> bool:
    """Whether standard error is a terminal whose lines can change."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def open_phases() -> Iterator[Phases]:
    """Phases on standard error, of the kind that fits to it."""
    phases = LivePhases() if is_live() else PlainPhases()
    try:
        yield phases
    finally:
        phases.pause()
