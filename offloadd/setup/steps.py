"""What a setup does, one file after the other: told first, done only when wanted, and recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.errors import NotFoundError
from offloadd.guix.files import Owner, make_directory, publish_new, read_whole, refuse_link, replace
from offloadd.setup.journal import MAX_SIZE, Journal

MADE_BY = "Made by offload: a change is lost."


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something that is done for one machine, or for all."""

    machine: str = ""
    """Empty: for all."""
    paths: tuple[Path, ...]
    """What it may write."""
    pending: Callable[[], Iterable[Path]]
    """Those that it would write now.  NotFoundError: all of them, as what they are made of is still to be made."""
    do: Callable[[], Iterable[str]]
    """Do it; the fingerprints that were put into an ACL."""
    intended: Callable[[], Iterable[str]] = tuple
    """The fingerprints that it would put into an ACL now."""

    def wanted(self) -> list[Path]:
        """The files that it would write now."""
        try:
            return list(self.pending())
        except NotFoundError:
            return list(self.paths)


def perform(steps: Sequence[Step], journal: Journal) -> Iterator[Path]:
    """Do what is not done yet; each file that is written.

    Raises:
        OffloadError: what went wrong; what was done until then is in the journal.
    """
    # What is wrong with a file is told before the first one is written.
    for step in steps:
        step.wanted()
    for step in steps:
        if wanted := step.wanted():
            with journal.recording(step.machine, step.paths, step.intended) as keys:
                keys += step.do()
            yield from wanted


def file_step(path: Path, text: Callable[[], bytes], mode: int = 0o644, owner: Owner | None = None, machine: str = "") -> Step:
    """A file that is to have this content.  Mode and owner are a new one's.

    Args:
        text: makes it when it is needed; NotFoundError: what it is made of is still to be made.
    """

    def pending() -> list[Path]:
        if _read(path) == text():
            return []
        refuse_link(path)
        return [path]

    def do() -> tuple[str, ...]:
        make_directory(path.parent, None)
        content = text()
        if not publish_new(path, content, mode, owner):
            replace(path, content, mode, owner)
        return ()

    return Step(machine=machine, paths=(path,), pending=pending, do=do)


def read_text(path: Path) -> str | None:
    """None when there is no such file; bytes that are no UTF-8 survive being written again."""
    content = _read(path)
    return None if content is None else content.decode("utf-8", "surrogateescape")


def _read(path: Path) -> bytes | None:
    if not os.path.lexists(path):
        return None
    return read_whole(path, MAX_SIZE)
