"""A second socket of our daemon's, for a build daemon that runs as a user of its own.

Our own socket is for our user alone: whoever may use it has all that the daemon can do.  Behind a door there are machines to
ask for, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from offloadd.model.base import Text, Value
from offloadd.model.machine import BuildDaemon


def _absolute(value: str) -> str:
    if not Path(value).is_absolute() or ".." in Path(value).parts:
        raise ValueError("is not absolute")
    return value


AbsolutePath = Annotated[Text, AfterValidator(_absolute)]


class Door(Value):
    """One of them, as a setup records it."""

    daemon: BuildDaemon
    directory: AbsolutePath
    """Made by our daemon, for this socket alone."""
    uid: Annotated[int, Field(ge=0, lt=2**32 - 1)]
    """Who may come in, besides root and us."""
    gid: Annotated[int, Field(ge=0, lt=2**32 - 1)]
    """That user's group."""
    keys: AbsolutePath
    """A folder with the copies of client keys that this user can read, each under its machine's name."""

    @property
    def socket(self) -> Path:
        return Path(self.directory, "offloadd.sock")
