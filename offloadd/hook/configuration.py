"""A configuration directory of Guix's for one build: like the real one, but with a single machine in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MACHINES = "machines.scm"
_PREFIX = "offload-hook-"


@contextmanager
def open_configuration(real: Path, entry: str) -> Iterator[Path]:
    """A directory that is like `real` but for the machines.

    It is needed to the build's end: Guix reads the ACL when it takes the outputs back.  The build daemon kills a hook whose
    client has gone, so each removes what others have left; who is alive holds a lock on his.

    Args:
        entry: the text of machines.scm.
    """
    parent = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - what we make there is new, and ours alone
    _sweep(parent)
    folder = parent / f"{_PREFIX}{os.urandom(8).hex()}"
    folder.mkdir(0o700)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / MACHINES).write_text(entry, encoding="utf-8")
        for path in _others(real):
            (folder / path.name).symlink_to(path)
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _others(real: Path) -> list[Path]:
    try:
        return [path for path in real.iterdir() if path.name != MACHINES]
    except OSError:  # there is none, or it is not for us to look into: the real program says what it misses
        return []


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_PREFIX}*"):
        # Somebody else's, not a directory, removed meanwhile, or its hook lives: then it is not for us.
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if any(left.iterdir()):  # else it may be one that is being made
                        _remove(left)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
