"""A build between its request and its end, as everybody in the daemon sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from offloadd.daemon.events import EventLog
from offloadd.daemon.work import Work
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import BuildState

PROGRESS_S = 0.2
_LASTING = ("machine", "kind", "route", "retried")
"""Fields of the result that an attempt finds there."""
LOG_TAIL = 64 * 1024
"""Characters of the log in which the words of an emulator that failed are looked for."""


OUTPUTS = "outputs.tar"


class LogTail:
    """The last words of a log that comes in pieces."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self._size += len(text)
        # Cut now and then, not at each of a million pieces.
        if self._size > 2 * LOG_TAIL:
            self._pieces = [self.text()]
            self._size = len(self._pieces[0])

    def text(self) -> str:
        return "".join(self._pieces)[-LOG_TAIL:]


@dataclass
class ActiveBuild:
    """One build between its request and its end."""

    id: str
    request: BuildRequest
    system: str
    folder: Path
    events: EventLog
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    waiting: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of who waits for the source."""
    source_begun: bool = False
    source_complete: trio.Event = field(default_factory=trio.Event)
    summary: dict[str, Any] = field(default_factory=dict)
    """What is known of it from the beginning."""
    result: dict[str, Any] = field(default_factory=dict)
    """What becomes build.json."""
    cancelled: str = ""
    """Why, when somebody cancelled it."""
    log_tail: LogTail = field(default_factory=LogTail)
    _told: float = 0.0

    @property
    def source(self) -> Path:
        """The source as it was sent, a tar."""
        return self.folder / "source.tar"

    @property
    def outputs(self) -> Path:
        return self.folder / OUTPUTS

    def begin_attempt(self, work: Work) -> None:
        """Forget what an attempt on another machine has left."""
        self.log_tail = LogTail()
        self.outputs.unlink(missing_ok=True)
        self.result = self.summary | describe(work) | {key: value for key, value in self.result.items() if key in _LASTING}

    def tell(self, text: str, fraction: float | None = None) -> None:
        """Note progress; what changes faster than anybody reads is thinned out."""
        now = trio.current_time()
        if fraction is None or now - self._told >= PROGRESS_S:
            self._told = now if fraction is not None else 0.0
            self.events.append("phase", text=text, fraction=None if fraction is None else round(fraction, 3))


class Move(Protocol):
    def __call__(self, active: ActiveBuild, state: BuildState, **changes: Any) -> None: ...


def describe(work: Work) -> dict[str, Any]:
    """What a build's record says of what is built."""
    described: dict[str, Any] = {
        "name": work.recipe.name,
        "version": work.version,
        "system": work.system,
        "suite": work.recipe.suite,
        "sources": [path.name for path in work.sources],
    }
    if work.date_from:
        described["date_from"] = work.date_from
    return described
