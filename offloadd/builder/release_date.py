"""The release date of a source, for `--date auto`.

A build that stops working with time worked when its source was released.  What tells that date, the best first:

1. the newest entry of debian/changelog;
2. for a directory, the date of its last commit;
3. the newest file time.

A date before 1980 or in the future is not believed, nor one that a packaging tool writes into all its archives: then the next
best is taken, and the origin says so.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from offloadd.builder.changelog import MAX_ENTRY_BYTES, Entry, top_entry
from offloadd.builder.dsc import MAX_DSC_BYTES, parse_dsc
from offloadd.builder.packed import BROKEN, TARS, file_times, open_unpacked, read_member
from offloadd.errors import NotFoundError, OffloadError
from offloadd.model.quantity import format_date

FIRST_BELIEVED = datetime(1980, 1, 2, tzinfo=UTC)
"""The first day of zip's and FAT's calendar, 1980-01-01 anywhere in the world, stands for "not known"."""
MADE_UP = {
    datetime(1985, 10, 26, 8, 15, tzinfo=UTC): "npm",
    datetime(2020, 2, 2, tzinfo=UTC): "hatchling",
}
"""Times that tools give to every file of an archive, whenever it was made: npm's tar-pack, hatchling's reproducible builds."""
_HINT = "give the date: --date 2020-01-01"
_GIT_LIMIT_S = 30
_CHANGELOG = re.compile(r"([^/]+/)?debian/changelog")
_DIFF_TITLE = re.compile(rb"\+\+\+ [^/\n]+/debian/changelog\s")


class ReleaseDate(NamedTuple):
    """When something was released, and how that is known."""

    date: datetime
    """In UTC."""
    origin: str
    """E.g. `debian/changelog of mbedtls 2.28.3-1`."""


def release_date_of_sources(files: Sequence[Path], *, now: datetime | None = None) -> ReleaseDate:
    """The release date of fetched files: archives, or a .dsc with its files.  Blocks.

    Raises:
        NotFoundError: none of them has a date that can be believed.
    """
    judge = _Judge(now or datetime.now(UTC))
    if found := judge.changelog(_changelog_of(files)):
        return found
    newest = [(moment, path.name) for path in files if (moment := judge.newest(path.name, file_times(path)))]
    if not newest:
        names = ", ".join(path.name for path in files) or "nothing that is fetched"
        raise NotFoundError(f"no release date can be found{judge.doubts()}", subject=names, hint=_HINT)
    moment, name = max(newest)
    return ReleaseDate(moment, f"the newest file in {name}{judge.doubts()}")


def release_date_of_directory(directory: Path, *, now: datetime | None = None) -> ReleaseDate:
    """The release date of a source tree; runs git when there is one.  Blocks.

    Raises:
        NotFoundError: the tree has no date that can be believed.
    """
    judge = _Judge(now or datetime.now(UTC))
    if found := judge.changelog(_entry_in_directory(directory)):
        return found
    if (moment := _commit_date(directory)) and judge.believes(moment, "the commit"):
        return ReleaseDate(moment, f"the last commit{judge.doubts()}")
    if moment := judge.newest("the directory", _tree_times(directory)):
        return ReleaseDate(moment, f"the newest file in the directory{judge.doubts()}")
    raise NotFoundError(f"no release date can be found{judge.doubts()}", subject=str(directory), hint=_HINT)


class _Judge:
    """Decides which dates are believed, and remembers those that were not."""

    def __init__(self, now: datetime) -> None:
        self._now = now
        self._refused: list[str] = []

    def believes(self, moment: datetime, who: str) -> bool:
        if FIRST_BELIEVED <= moment <= self._now and moment not in MADE_UP:
            return True
        reason = f", as {MADE_UP[moment]} writes everywhere" if moment in MADE_UP else ""
        self._refused.append(f"{who} says {format_date(moment)}{reason}")
        return False

    def changelog(self, entry: Entry | None) -> ReleaseDate | None:
        origin = "debian/changelog"
        if entry is None or not self.believes(entry.date, origin):
            return None
        return ReleaseDate(entry.date, f"{origin} of {entry.source} {entry.version}")

    def newest(self, name: str, moments: Iterable[datetime]) -> datetime | None:
        """The newest that can be believed."""
        newest = refused = None
        for moment in moments:
            if FIRST_BELIEVED <= moment <= self._now and moment not in MADE_UP:
                newest = max(moment, newest or moment)
            else:
                refused = max(moment, refused or moment)
        if refused and (newest is None or refused > newest):
            self.believes(refused, f"a file in {name}")
        return newest

    def doubts(self) -> str:
        return f" ({'; '.join(self._refused)}: not believed)" if self._refused else ""


def _changelog_of(files: Sequence[Path]) -> Entry | None:
    """The newest changelog entry of the Debian source packages whose files are among `files`."""
    found = [entry for path in files if path.name.endswith(".dsc") and (entry := _entry_of(path, files))]
    return max(found, key=lambda entry: entry.date, default=None)


def _entry_of(dsc: Path, files: Sequence[Path]) -> Entry | None:
    try:
        with dsc.open("rb") as file:
            names = {listed.name for listed in parse_dsc(file.read(MAX_DSC_BYTES + 1), dsc.name).files}
        own = [path for path in files if path.name in names]
        # The upstream's archive may have an old debian/ of its own.
        own.sort(key=lambda path: ".orig" in path.name)
        return next((entry for path in own if (entry := _entry_in_archive(path))), None)
    except (OffloadError, *BROKEN):
        return None


def _entry_in_archive(path: Path) -> Entry | None:
    if path.name.endswith(".diff.gz"):
        with open_unpacked(path) as stream:
            return top_entry(added_changelog(stream))
    if not path.name.endswith(TARS):
        return None
    return top_entry(read_member(path, lambda name: _CHANGELOG.fullmatch(name) is not None, MAX_ENTRY_BYTES) or b"")


def added_changelog(diff: BinaryIO) -> bytes:
    """The beginning of the debian/changelog that the patch `diff` makes."""
    inside = False
    found = b""
    while len(found) < MAX_ENTRY_BYTES and (line := diff.readline(MAX_ENTRY_BYTES)):
        if line.startswith(b"+++ "):
            inside = _DIFF_TITLE.match(line) is not None
        elif inside and line.startswith(b"+"):
            found += line[1:]
        elif found:
            break
    return found


def _entry_in_directory(directory: Path) -> Entry | None:
    try:
        with (directory / "debian/changelog").open("rb") as file:
            return top_entry(file.read(MAX_ENTRY_BYTES))
    except OSError:
        return None


def _commit_date(directory: Path) -> datetime | None:
    """When the last commit that touched `directory` was made; None when git knows of none."""
    # The user's settings may have every log check signatures.
    argv = ["git", "-c", "log.showSignature=false", "-C", str(directory), "log", "-1", "--format=%ct", "--", "."]
    try:
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=_GIT_LIMIT_S, check=True)
        return datetime.fromtimestamp(int(done.stdout), UTC)
    except (OSError, subprocess.SubprocessError, ValueError, OverflowError):
        return None


def _tree_times(directory: Path) -> Iterator[datetime]:
    """Of the files below `directory`, but for those of git."""
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name != ".git"]
        for name in names:
            try:
                about = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - a tree may be large
                yield datetime.fromtimestamp(int(about.st_mtime), UTC)
            except (OSError, ValueError, OverflowError):
                continue
