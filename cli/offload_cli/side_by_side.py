"""Several builds at once: a line of progress for each, the log of each in its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from offload_cli.order import Done, Order, carry_out
from offload_cli.phases import Phases, PlainPhases, is_live
from offload_cli.terminal import one_line, say
from offloadd.errors import OffloadError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LAST_LINES = 12
_LOOK_S = 0.2
_LAST_WORD_S = 2.0


@dataclass
class Run:
    """One of the builds."""

    name: str
    order: Order
    build: str = ""
    done: Done | None = None
    error: OffloadError | None = None
    _broken: BaseException | None = field(default=None, repr=False)

    @property
    def exit_status(self) -> int:
        return self.error.exit_status if self.error else self.done.ended.exit_status if self.done else 130

    def carry_out(self, phases: Phases) -> None:
        """The whole build, in a thread of its own."""
        from offloadd.client import Client

        try:
            with Client() as client:
                self.done = carry_out(client, self.order, phases, _NoLog(), self._created)
            phases.tell(self.done.ended.state, 1.0)
        except OffloadError as exc:
            self.error = exc
            phases.tell(one_line(str(exc), 60), 1.0)
        except BaseException as exc:
            self._broken = exc

    def _created(self, build: str) -> None:
        self.build = build

    def reraise(self) -> None:
        """Raise what should not have happened."""
        if self._broken is not None:
            raise self._broken


class _NoLog:
    """It is in the result; here it would be mixed with the others'."""

    def write(self, text: str) -> None:
        pass

    def end(self) -> None:
        pass


class _Board(Protocol):
    def phases(self, name: str) -> Phases:
        """Where the progress of one build is shown."""


class _PlainBoard:
    def phases(self, name: str) -> Phases:
        return PlainPhases(name)


class _LiveBoard:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def phases(self, name: str) -> Phases:
        return _Line(self._progress, self._progress.add_task("", total=None, name=name), name)


class _Line:
    """One build's line; what it says last stays."""

    def __init__(self, progress: Progress, task: TaskID, name: str) -> None:
        self._progress = progress
        self._task = task
        self._name = name

    def tell(self, text: str, fraction: float | None) -> None:
        total, completed = (None, 0.0) if fraction is None else (1.0, min(max(fraction, 0.0), 1.0))
        self._progress.update(self._task, description=f"{self._name}: {one_line(text, 100)}", total=total, completed=completed)

    def line(self, text: str) -> None:
        self.tell(text, None)

    def pause(self) -> None:
        pass


@contextmanager
def _open_board() -> Iterator[_Board]:
    if not is_live():
        yield _PlainBoard()
        return
    from offload_cli.phases import make_progress

    with make_progress(transient=False) as progress:
        yield _LiveBoard(progress)


def carry_out_all(orders: Sequence[tuple[str, Order]]) -> list[Run]:
    """Carry out all of them, each in a thread.

    Raises:
        KeyboardInterrupt: after all were cancelled.
    """
    runs = [Run(name, order) for name, order in orders]
    with _open_board() as board:
        threads = [threading.Thread(target=run.carry_out, args=[board.phases(run.name)], daemon=True) for run in runs]
        for thread in threads:
            thread.start()
        try:
            # With a limit: a wait without one takes no Ctrl-C.
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(_LOOK_S)
        except KeyboardInterrupt:
            _cancel(runs)
            # They are told of it: the last that their lines say is how they ended.
            deadline = time.monotonic() + _LAST_WORD_S
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 0.0))
            raise
    for run in runs:
        run.reraise()
    return runs


def _cancel(runs: Sequence[Run]) -> None:
    from offloadd.client import Client

    say("cancelling the builds (Ctrl-C again: do not wait for them)")
    with Client() as client:
        for run in runs:
            if run.build:
                client.cancel_build(run.build)


def last_lines(log: str) -> str:
    """The end of a log, for the message about a build whose log was not shown."""
    return "\n".join(f"  | {line}" for line in log.rstrip().splitlines()[-_LAST_LINES:])
