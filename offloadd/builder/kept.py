"""Files that are kept by their digest, in `<root>/<sha256>/<filename>`.

A file gets there by one rename after its digest was checked, so that nothing half-made ever has that name.  All of this blocks:
call it in a thread, but for `open_partial`, which touches no data.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from offloadd.errors import FetchError, SourceError

_PIECE_BYTES = 1024**2
_PARTIAL = ".partial-"
_SURELY_LOCKED_S = 60.0
"""A new partial file is not locked for a moment; after this many seconds without a write it is, or nobody writes it."""
_RESUMED = ".resumed-"
_RESUMED_S = 7 * 86400.0
"""How long the beginning of a file waits for its end."""
WORTH_BYTES = 1024**2
"""A shorter beginning is not kept: to fetch it again costs nothing."""


class PartialFile:
    """A file that grows: counts and digests what is written; `keep` gives it its place."""

    def __init__(self, root: Path, file: IO[bytes], path: Path, *, filename: str, sha256: str, max_bytes: int) -> None:
        self.filename = filename
        self.size = 0
        self._root = root
        self._file = file
        self._path = path
        self._sha256 = sha256
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()

    @property
    def is_right(self) -> bool:
        """Whether it has the digest that it shall have."""
        return self._digest.hexdigest() == self._sha256

    def read_back(self) -> None:
        """Count and digest what is there already, from an earlier time."""
        self._file.seek(0)
        while piece := self._file.read(_PIECE_BYTES):
            self.size += len(piece)
            self._digest.update(piece)

    def restart(self) -> None:
        """Forget what was written."""
        self.size, self._digest = 0, hashlib.sha256()
        self._file.seek(0)
        self._file.truncate()

    def check_size(self, size: int) -> None:
        """Raise SourceError when `size` bytes are more than allowed."""
        if size > self._max_bytes:
            raise SourceError(f"is larger than the limit of {self._max_bytes} bytes", subject=self.filename)

    def write(self, piece: bytes) -> None:
        self.size += len(piece)
        self.check_size(self.size)
        self._digest.update(piece)
        self._file.write(piece)

    def copy_from(self, path: Path) -> None:
        """Write the content of `path`; FetchError when it cannot be read."""
        try:
            file = path.open("rb")
        except OSError as exc:
            raise FetchError(f"cannot be read: {exc.strerror}", subject=str(path)) from exc
        with file:
            while piece := file.read(_PIECE_BYTES):
                self.write(piece)

    def keep(self, subject: str, said_by: str = "the recipe") -> Path:
        """Move the file to its place; SourceError about `subject` when its digest is another one than `said_by` says."""
        found = self._digest.hexdigest()
        if found != self._sha256:
            raise SourceError(
                f"has another digest than {said_by} says",
                subject=subject,
                hint="was the file exchanged, or the digest copied for another one?",
                detail=f"wanted: sha256 {self._sha256}\nfound:  sha256 {found} ({self.size} bytes)",
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        target = self._root / self._sha256 / self.filename
        target.parent.mkdir(exist_ok=True)
        self._path.chmod(0o644)
        self._path.replace(target)
        return target


@contextmanager
def open_partial(root: Path, filename: str, sha256: str, *, max_bytes: int) -> Iterator[PartialFile]:
    """A new file beside the kept ones, locked while it grows, gone at the end unless it was kept."""
    with tempfile.NamedTemporaryFile(dir=root, prefix=_PARTIAL, delete=False) as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        try:
            yield PartialFile(root, file, Path(file.name), filename=filename, sha256=sha256, max_bytes=max_bytes)
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def open_resumed(root: Path, filename: str, sha256: str, *, max_bytes: int) -> Iterator[PartialFile]:
    """As `open_partial`, but what was written stays for the next time, unless it is short or (a SourceError) wrong.

    Whoever opens it calls `read_back` first.  While somebody else fetches the same file, it is a new one.
    """
    path = root / f"{_RESUMED}{sha256}"
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b") as file:
        if not _is_ours(file, path):
            with open_partial(root, filename, sha256, max_bytes=max_bytes) as growing:
                yield growing
            return
        growing, keeps = PartialFile(root, file, path, filename=filename, sha256=sha256, max_bytes=max_bytes), True
        try:
            yield growing
        except SourceError:
            keeps = False
            raise
        finally:
            if not keeps or growing.size < WORTH_BYTES:
                path.unlink(missing_ok=True)


def _is_ours(file: IO[bytes], path: Path) -> bool:
    """Lock it; False when somebody else has it, or had it and has moved it to its place since it was opened."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False


def sweep(root: Path) -> None:
    """Make the cache, and remove what a killed process left in it: partial files that nobody holds the lock of."""
    root.mkdir(parents=True, exist_ok=True)
    for prefix, age_s in ((_PARTIAL, _SURELY_LOCKED_S), (_RESUMED, _RESUMED_S)):
        for path in root.glob(f"{prefix}*"):
            with suppress(OSError), path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime < age_s:
                    continue
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def find_kept(root: Path, sha256: str, is_named: Callable[[str], bool]) -> Path | None:
    """The file with this digest and a fitting name, its digest checked again; a damaged one is removed."""
    for path in sorted((root / sha256).glob("*")):
        if not is_named(path.name):
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == sha256:
            return path
        path.unlink()
    return None
