"""What is being done now: one line that changes on a terminal, a line for each phase elsewhere."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from offload_cli.terminal import one_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_CHANGING = re.compile(r"\([^()]*\)$|\d+")
_EVERY_S = 5.0


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
    """The phase with its bar and the time since the beginning, in one line that vanishes at the end."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began: float | None = None

    def tell(self, text: str, fraction: float | None) -> None:
        progress = self._progress or self._start()
        assert self._task is not None
        # The total None makes a bar that only moves.
        total, completed = (None, 0.0) if fraction is None else (1.0, min(max(fraction, 0.0), 1.0))
        progress.update(self._task, description=one_line(text, 100), total=total, completed=completed)

    def _start(self) -> Progress:
        self._progress = make_progress(transient=True)
        self._progress.start()
        self._task = self._progress.add_task("", total=None)
        task = self._progress.tasks[0]
        self._began = task.start_time = self._began if self._began is not None else task.start_time
        return self._progress

    def line(self, text: str) -> None:
        self.pause()
        sys.stderr.write(f"==> {one_line(text)}\n")
        sys.stderr.flush()

    def pause(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None


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
