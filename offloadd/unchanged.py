"""Whether files are still what they were when they were read: for what takes longer to read than to look at."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

Signature = tuple[tuple[str, int, int, int], ...]
"""Path, time of change, size and inode of each file."""

_FRESH_NS = 100_000_000
"""A file younger than this may change again without another time of change."""


def sign(paths: Iterable[Path]) -> Signature:
    """How the files are now; those that are missing are left out.

    Raises:
        OSError: one cannot be looked at.
    """
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # a link to nowhere, too: whoever reads it is told
            about = path.stat()
            found.append((str(path), about.st_mtime_ns, about.st_size, about.st_ino))
    return tuple(found)


def is_settled(signature: Signature) -> bool:
    """Whether a file that changes from now on will have another signature."""
    newest = max((changed for _, changed, _, _ in signature), default=0)
    return time.time_ns() - newest > _FRESH_NS
