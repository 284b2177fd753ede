"""The line that changes on a terminal."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from offload_cli import phases
from offload_cli.phases import LivePhases

NEVER_S = 3600.0


class Shown:
    """Stands for rich's progress: what it was told."""

    def __init__(self) -> None:
        self.on = threading.Event()
        self.made = 0
        self.texts: list[str] = []
        self.tasks = [self]
        self.task_ids = [0]
        self.start_time: float | None = None

    def make(self, *, transient: bool) -> Shown:
        self.made += 1
        return self

    def add_task(self, text: str, total: float | None) -> None: ...

    def update(self, task: int, *, description: str, total: float | None, completed: float) -> None:
        self.texts.append(description)

    def start(self) -> None:
        self.on.set()

    def stop(self) -> None:
        self.on.clear()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    progress = Shown()
    monkeypatch.setattr(phases, "make_progress", progress.make)
    return progress


def test_what_is_over_in_a_moment_does_not_flicker(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    live = LivePhases(NEVER_S)
    for text in ("waiting for the guest", "a fresh clone", "building"):
        live.tell(text, None)
    live.line("[1/1] make")
    live.tell("collecting the outputs", None)
    live.pause()
    assert capsys.readouterr().err == "==> [1/1] make\n"
    assert shown.made == 0
    assert all(thread.finished.is_set() for thread in threading.enumerate() if isinstance(thread, threading.Timer))


def test_what_lasts_is_shown_with_its_newest_text(shown: Shown) -> None:
    live = LivePhases(0.0)
    live.tell("booting", None)
    assert shown.on.wait(10)
    live.tell("fetching", 0.5)
    assert shown.texts[-1] == "fetching"
    live.pause()
    assert not shown.on.is_set()
    live.tell("building", None)
    assert shown.on.wait(10)
    assert (shown.made, shown.texts[-1]) == (2, "building")
    live.pause()


def test_a_line_that_is_called_off_at_the_last_moment_does_not_come(shown: Shown) -> None:
    live = LivePhases(NEVER_S)
    live.tell("booting", None)
    due: Any = live._due
    live.pause()
    # Its timer had run out, and waited for the lock.
    due.function()
    assert shown.made == 0
