"""Which files of a build directory the patterns of the outputs mean, from their names alone.

The patterns are those of the build service (images/guest/build_service/patterns.py), which looks at the files themselves: `*`,
`?` and sets as the shell has them, none of them for a dot at the beginning, and `**` for any number of directories.  A pattern
that matches a directory means all that is in it.  One difference: `a/**` means a file `a` too, for no name tells what it is of.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

_ANY_DEPTH = "**"


class OutputPattern:
    """One pattern."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts = [_compile(part) for part in text.split("/") if part not in ("", ".")]

    def covers(self, name: str) -> bool:
        """Whether it matches `name`, relative to the build directory (itself: empty), or a directory that it lies in."""
        states = self._closed({0})
        for part in name.split("/") if name else ():
            if len(self._parts) in states:
                return True
            states = self._closed(state for at in states if (state := self._step(at, part)) is not None)
        return len(self._parts) in states

    def _step(self, at: int, name: str) -> int | None:
        """How many of its parts are used up when `name` follows the first `at`; None: it does not fit."""
        part = self._parts[at]
        if part is None:
            return at
        return at + 1 if part.fullmatch(name) else None

    def _closed(self, states: Iterable[int]) -> set[int]:
        """Those and what they are as well: `**` may be no directory at all."""
        found = set(states)
        for at, part in enumerate(self._parts):
            if at in found and part is None:
                found.add(at + 1)
        return found


def _compile(part: str) -> re.Pattern[str] | None:
    """One component; None: `**`."""
    if part == _ANY_DEPTH:
        return None
    hidden = "" if part.startswith(".") else r"(?!\.)"
    # The shell has both signs for "none of these", the standard library only one.
    return re.compile(hidden + fnmatch.translate(part.replace("[^", "[!")))
