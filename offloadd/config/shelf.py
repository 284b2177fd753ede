"""The library, kept until one of its files changes: to read all of them takes a fifth of a second."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from offloadd.config.library import Library, load_library
from offloadd.errors import ConfigError
from offloadd.unchanged import Signature, is_settled, sign


class Shelf:
    """The library of some folders: looked at each time, and read again when a file has changed."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(folders)
        self._seen: Signature | None = None
        self._library: Library | None = None

    def library(self) -> Library:
        """As `load_library`."""
        signature = self._sign()
        if self._library is None or signature is None or signature != self._seen:
            self._library = load_library(self._folders)
            self._seen = signature if signature is not None and is_settled(signature) else None
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

    def _sign(self) -> Signature | None:
        """None when a file cannot be looked at: whoever reads it tells why."""
        paths = [path for folder in self._folders for kind in ("images", "machines") for path in (folder / kind).glob("*.yaml")]
        try:
            return sign(sorted(paths))
        except OSError:
            return None
