"""What a setup has changed, so that it can be undone exactly: each file with what it was before and what we have made of it.

    {"version": 1, "originals": {ACL: SNAPSHOT}, "records": [{"path", "machine", "before", "after", "keys"}, ...]}

A record is written before the change, and completed after it: also what was interrupted is known, and the keys that it was to
put into an ACL.  A file that somebody else has changed since is left alone.  Of an ACL, which several machines are in
and others change too, only our keys are taken out.
"""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from offloadd.errors import HostError, NotFoundError, OffloadError
from offloadd.guix.acl import COMMENTS, Entry, forget_comments, open_acl
from offloadd.guix.files import Owner, files_of, locked, read_small, read_whole, remove, remove_directory
from offloadd.guix.files import replace as write_file
from offloadd.guix.key import PUBLIC_KEY, read_public_key
from offloadd.guix.sexp import parse_sexp
from offloadd.paths import make_private

MAX_SIZE = 16 * 1024**2
Verdict = Literal["removed", "restored", "key taken out", "left: it has been changed since", "was gone already"]


@dataclass(frozen=True)
class Undone:
    path: Path
    verdict: Verdict


@dataclass(frozen=True)
class Record:
    """One file or directory that was changed for one machine, or for all of them."""

    path: Path
    machine: str
    """Empty: for all."""
    before: str | None
    """Its content in base64; None: it was not there."""
    after: str | None = None
    """SHA-256 of what we made of it; `directory`: a directory; None: it was not made to the end."""
    keys: tuple[str, ...] = ()
    """Fingerprints that were put into it, when it is an ACL; while `after` is None, those that were to be."""


def setup_name(which: str, directory: Path) -> str:
    """The name of the files that belong to the setup of this directory: there is one for each."""
    return f"{which}-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"


class Journal:
    """The records of one setup, in the order of the changes."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: its file, which need not be there.
        Raises:
            HostError: it cannot be read, or is none.
        """
        self._path = path
        self.records: list[Record] = []
        self._originals: dict[str, str | None] = {}
        self._read()

    def _read(self) -> None:
        try:
            data = read_small(self._path, MAX_SIZE)
        except NotFoundError:
            self.records, self._originals = [], {}
            return
        try:
            self._load(json.loads(data))
        except (ValueError, TypeError, KeyError) as exc:
            hint = "without it nothing can be undone; move it away to set up anew"
            raise HostError("is no journal of a setup", subject=str(self._path), hint=hint) from exc

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """As it is now, and nobody else changes it: two setups may run at once."""
        make_private(self._path.parent)
        with locked(self._path.parent):
            self._read()
            yield

    def _load(self, found: Any) -> None:
        self._originals = dict(found["originals"])
        rows = [row | {"path": Path(row["path"]), "keys": tuple(row["keys"])} for row in found["records"]]
        self.records = [Record(**row) for row in rows]

    def _save(self) -> None:
        if not self.records:
            remove(self._path)
            return
        rows = [vars(record) | {"path": str(record.path)} for record in self.records]
        text = json.dumps({"version": 1, "originals": self._originals, "records": rows}, indent=1)
        # A file of the user's that is kept here may have a secret in it.
        write_file(self._path, text.encode(), 0o600, None)

    @property
    def machines(self) -> set[str]:
        return {record.machine for record in self.records} - {""}

    @contextmanager
    def recording(
        self, machine: str, paths: Sequence[Path], intended: Callable[[], Iterable[str]] = tuple
    ) -> Iterator[list[str]]:
        """Record what the block makes of these files, and of the directories on the way; an ACL's new keys go into the list.

        Args:
            intended: tells the keys that are to be put into an ACL, in case that the block does not come to its end.
        Raises:
            NotAllowedError, HostError: a file cannot be read, or the journal not be written.
            OffloadError: from `intended`.
        """
        with self._alone():
            yield from self._record(machine, paths, tuple(intended()))

    def _record(self, machine: str, paths: Sequence[Path], intended: tuple[str, ...]) -> Iterator[list[str]]:
        keys: list[str] = []
        began = len(self.records)
        for path in paths:
            self._note_directories(path.parent, machine)
            self.records.append(Record(path, machine, _content(path), keys=intended))
        self._save()
        try:
            yield keys
        finally:
            done = [_completed(record, tuple(keys)) for record in self.records[began:]]
            self.records[began:] = [record for record in done if record is not None]
            # Also of an earlier one that was interrupted.
            for record in self.records:
                if record.keys:
                    self._originals.setdefault(str(record.path), record.before)
            self._save()

    def _note_directories(self, directory: Path, machine: str) -> None:
        missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        known = {record.path for record in self.records}
        self.records += [Record(folder, machine, None, "directory") for folder in reversed(missing) if folder not in known]

    def undo(self, machines: Sequence[str] = ()) -> Iterator[Undone]:
        """Take back what was done for these machines; for all, and what was done for the host, when none is named or left.

        Raises:
            NotFoundError: nothing was set up for such a machine.
            NotAllowedError, HostError: a file cannot be written.
        """
        for record in self._select(machines):
            with self._alone():
                verdict = self._undo_recorded(record) if record in self.records else None
            if verdict:
                yield Undone(record.path, verdict)

    def _undo_recorded(self, record: Record) -> Verdict | None:
        verdict = self._undo(record)
        at = self.records.index(record)
        # What another machine's files are in goes with the last one.
        shared = record.after == "directory" and record.path.is_dir() and self.machines - {record.machine}
        self.records[at : at + 1] = [replace(record, machine="")] if shared else []
        if not any(other.path == record.path for other in self.records):
            self._originals.pop(str(record.path), None)
        self._save()
        return verdict

    def paths(self, machines: Sequence[str] = ()) -> list[Path]:
        """The files that `undo` would look at."""
        return list(dict.fromkeys(record.path for record in self._select(machines) if record.after != "directory"))

    def _select(self, machines: Sequence[str]) -> list[Record]:
        """The last one first."""
        for machine in machines:
            if machine not in self.machines:
                raise NotFoundError("nothing was set up for it", subject=machine)
        everything = not machines or self.machines <= set(machines)
        return [record for record in reversed(self.records) if everything or record.machine in machines]

    def _undo(self, record: Record) -> Verdict | None:
        if record.after == "directory":
            # Others may have put something there.
            with suppress(OffloadError):
                remove_directory(record.path)
            return None
        now = _content(record.path)
        if record.keys:
            if record.after is None:
                # The comments are written before the ACL.
                forget_comments(record.path, record.keys)
            if record.after is not None or now != record.before:
                return self._take_out(record)
        if now == record.before:
            return "was gone already" if now is None else None
        if record.after is None or _digest(now) != record.after:
            return "left: it has been changed since"
        return _put_back(record.path, record.before)

    def _take_out(self, record: Record) -> Verdict:
        if not record.path.exists():
            return "was gone already"
        with open_acl(record.path) as acl:
            for key in record.keys:
                # Somebody was faster.
                with suppress(NotFoundError):
                    acl.revoke(key)
            left = acl.entries
        comments = record.path.with_name(COMMENTS)
        if _content(comments) == "":
            remove(comments)
        original = self._originals.get(str(record.path), record.before)
        if original is None:
            # A new one begins with the machine's own key.
            return _put_back(record.path, None) if all(_is_own(entry, record.path) for entry in left) else "key taken out"
        parsed = parse_sexp(b64decode(original), str(record.path))
        return _put_back(record.path, original) if parsed[1:] == tuple(entry.sexp for entry in left) else "key taken out"


def _is_own(entry: Entry, acl: Path) -> bool:
    with suppress(NotFoundError):
        return entry.key == read_public_key(acl.with_name(PUBLIC_KEY))
    return False


def _put_back(path: Path, content: str | None) -> Verdict:
    if content is None:
        remove(path)
        return "removed"
    info = path.stat()
    write_file(path, b64decode(content), info.st_mode & 0o7777, Owner(info.st_uid, info.st_gid))
    return "restored"


def _completed(record: Record, keys: tuple[str, ...]) -> Record | None:
    """With what is there now; None when that is what was there before."""
    if record.after == "directory":
        return record if record.path.is_dir() else None
    now = _content(record.path)
    if now == record.before:
        return None
    return replace(record, after=_digest(now), keys=keys or record.keys)


def _content(path: Path) -> str | None:
    with files_of(path):
        if not os.path.lexists(path):
            return None
    return b64encode(read_whole(path, MAX_SIZE)).decode()


def _digest(content: str | None) -> str:
    return "" if content is None else hashlib.sha256(b64decode(content)).hexdigest()
