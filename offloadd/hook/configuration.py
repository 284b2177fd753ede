"""A configuration directory of Guix's for one build: like the real one, but with a single machine in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MACHINES = "machines.scm"
_PREFIX = "offload-hook-"


@contextmanager
def open_configuration(real: str, entry: str) -> Iterator[str]:
    """A directory that is like `real` but for the machines.

    It is needed to the build's end: Guix reads the ACL when it takes the outputs back.  The build daemon kills a hook whose
    client has gone, so each removes what others have left; who is alive holds a lock on his.

    Args:
        entry: the text of machines.scm.
    """
    parent = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - what we make there is new, and ours alone
    _sweep(parent)
    folder = f"{parent}/{_PREFIX}{os.urandom(8).hex()}"
    os.mkdir(folder, 0o700)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{folder}/{MACHINES}", "w", encoding="utf-8") as file:
            file.write(entry)
        for name in _names(real):
            if name != MACHINES:
                os.symlink(f"{real}/{name}", f"{folder}/{name}")
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # there is none, or it is not for us to look into: the real program says what it misses
        return []


def _sweep(parent: str) -> None:
    for left in [f"{parent}/{name}" for name in _names(parent) if name.startswith(_PREFIX)]:
        # Somebody else's, not a directory, removed meanwhile, or its hook lives: then it is not for us.
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.listdir(left):  # else it may be one that is being made
                        _remove(left)
            finally:
                os.close(lock)


def _remove(folder: str) -> None:
    # What cannot be removed is left: the build has ended, and is not to fail by it.
    with suppress(OSError):
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)
