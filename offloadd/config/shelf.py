"""The library, kept until one of its files changes: to read all of them takes a fifth of a second."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from offloadd.config.library import Library, load_library
from offloadd.errors import ConfigError

_Signature = tuple[tuple[str, int, int, int], ...]
"""Path, time of change, size and inode of each file."""


class Shelf:
    """The library of some folders: looked at each time, and read again when a file has changed."""

    _FRESH_NS = 100_000_000
    """A file younger than this may change again without another time of change."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(folders)
        self._seen: _Signature | None = None
        self._library: Library | None = None

    def library(self) -> Library:
        """As `load_library`."""
        signature = self._sign()
        if self._library is None or signature != self._seen:
            self._library = load_library(self._folders)
            newest = max((changed for _, changed, _, _ in signature), default=0)
            self._seen = signature if time.time_ns() - newest > self._FRESH_NS else None
        return self._library

    def last_right(self) -> Library:
        """The library; while one of its files is wrong, what was declared before that.

        Raises:
            ConfigError: there was nothing before.
        """
        try:
            return self.library()
        except ConfigError:
            if self._library is None:
                raise
            return self._library

    def _sign(self) -> _Signature:
        paths = [path for folder in self._folders for kind in ("images", "machines") for path in (folder / kind).glob("*.yaml")]
        found = []
        for path in sorted(paths):
            with suppress(FileNotFoundError):  # a link to nowhere; whoever reads it is told
                about = path.stat()
                found.append((str(path), about.st_mtime_ns, about.st_size, about.st_ino))
        return tuple(found)
