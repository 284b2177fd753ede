"""Guix's ACL: the keys whose signed store items guix-daemon takes (guix/pki.scm).

    (acl (entry (public-key ...) (tag (guix import))) ...)

Guix refuses a whole ACL in which one entry has another form; such entries are kept all the same: somebody put them there.
The format has no place for comments, and Guix would refuse a file with one: they are in a file beside it, `acl.comments`,
which Guix does not read: lines of fingerprint, blank, comment.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from offloadd.errors import NotFoundError, OffloadError, UsageError
from offloadd.guix.files import Owner, locked, make_directory, read_small, read_whole, refuse_link, remove, replace, wrong
from offloadd.guix.key import PUBLIC_KEY, PublicKey, as_public_key, read_public_key
from offloadd.guix.sexp import MAX_SIZE, Sexp, advanced, parse_sexp

ACL = "acl"
COMMENTS = "acl.comments"
MODE = 0o644
SHORTEST_PREFIX = 4
"""Digits of a fingerprint that may stand for all."""

_IMPORT: Sexp = (b"tag", (b"guix", b"import"))
_FINGERPRINT = re.compile(r"[0-9a-f]+")
_SHARED = Path("/usr/share/guix"), Path("/usr/local/share/guix"), Path("/run/current-system/profile/share/guix")
"""Where Guix's packages bring the keys of its substitute servers."""


@dataclass(frozen=True)
class Entry:
    """One entry, and what is known of it."""

    sexp: tuple[Sexp, ...]
    comment: str = ""

    @property
    def key(self) -> PublicKey | None:
        """None when it is not about a public key."""
        return as_public_key(self.sexp[1]) if len(self.sexp) > 1 else None

    @property
    def is_understood(self) -> bool:
        """Whether it has the form that Guix expects of every entry, whatever it is about."""
        return len(self.sexp) == 3 and self.sexp[2] == _IMPORT

    @property
    def authorizes(self) -> bool:
        """Whether Guix takes what is signed by its key."""
        return self.key is not None and self.is_understood


class Acl:
    """An ACL in memory.  `open_acl` writes it back.

    Attributes:
        path: its file.
        entries: in their order, each once.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], *, is_there: bool) -> None:
        self.path = path
        self.entries = tuple({entry.sexp: entry for entry in entries}.values())
        self._in_file = [entry.sexp for entry in entries] if is_there else []

    @property
    def changed(self) -> bool:
        """Whether the file says something else.  How it is written makes no difference."""
        return [entry.sexp for entry in self.entries] != self._in_file

    @classmethod
    def read(cls, path: Path) -> Acl:
        """Read it in any form that Guix takes.  One that is not there has the machine's own key in it, as for Guix.

        Raises:
            ConfigError: it is none.
            NotAllowedError, HostError: it or its comments cannot be read.
        """
        try:
            data = read_small(path, MAX_SIZE)
        except NotFoundError:
            return cls(path, _own_entry(path.with_name(PUBLIC_KEY)), is_there=False)
        match parse_sexp(data, str(path)):
            case (b"acl", *entries):
                found = [_check_entry(path, number, entry) for number, entry in enumerate(entries, 1)]
                return cls(path, _with_comments(path, found), is_there=True)
        raise wrong(path, "", "is no ACL: expected `(acl (entry ...) ...)`")

    @property
    def text(self) -> bytes:
        """The file, as Guix writes it."""
        return advanced((b"acl", *(entry.sexp for entry in self.entries)))

    def find(self, key: PublicKey) -> Entry | None:
        """The entry by which Guix trusts this key."""
        return next((entry for entry in self.entries if entry.authorizes and entry.key == key), None)

    def authorize(self, key: PublicKey, comment: str = "") -> bool:
        """Put a key first, unless it is there already; a comment that is given replaces the one it has.

        Returns:
            Whether the key is new.

        Raises:
            UsageError: the comment has several lines or control characters.
        """
        if not comment.isprintable():
            raise UsageError("a comment is one line of text", subject=repr(comment))
        found = self.find(key)
        if found is None:
            self.entries = (Entry((b"entry", key.sexp, _IMPORT), comment.strip()), *self.entries)
        elif comment:
            changed = Entry(found.sexp, comment.strip())
            self.entries = tuple(changed if entry is found else entry for entry in self.entries)
        return found is None

    def revoke(self, which: str) -> tuple[Entry, ...]:
        """Take a key out.

        Args:
            which: its fingerprint, the beginning of one (at least 4 digits, of no other), or the name of its file.

        Returns:
            The entries that are gone.

        Raises:
            NotFoundError: it is not there.
            UsageError: the beginning is too short, or of several.
            ConfigError, NotAllowedError, HostError: the file is no key or cannot be read.
        """
        fingerprint = self._find_fingerprint(which)
        gone = tuple(entry for entry in self.entries if entry.key and entry.key.fingerprint == fingerprint)
        self.entries = tuple(entry for entry in self.entries if entry not in gone)
        return gone

    def _find_fingerprint(self, which: str) -> str:
        known = {entry.key.fingerprint for entry in self.entries if entry.key}
        prefix = which.lower()
        if not _FINGERPRINT.fullmatch(prefix):
            prefix = _read_named(which).fingerprint
        if len(prefix) < SHORTEST_PREFIX:
            raise UsageError(f"at least {SHORTEST_PREFIX} digits of a fingerprint are needed", subject=which)
        found = [fingerprint for fingerprint in known if fingerprint.startswith(prefix)]
        if not found:
            raise NotFoundError(f"{self.path} has no such key", subject=which, hint="offload guix acl list")
        if len(found) > 1:
            raise UsageError(f"{len(found)} keys begin so", subject=which, hint=" ".join(sorted(found)))
        return found[0]


@contextmanager
def open_acl(path: Path, owner: Owner | None = None, *, make: bool = True) -> Iterator[Acl]:
    """Read an ACL, let the block change it, and write it when it has changed and the block has not failed.

    One that is not there is written when it has entries, if only the machine's own key.
    Only one command of ours changes it at a time.

    Args:
        owner: whose a new one is; None: ours.  Mode and owner of one that is there stay.
        make: its directory, when that is not there.

    Raises:
        ConfigError: it is none.
        NotFoundError: its directory is not there.
        NotAllowedError, HostError: it or its comments cannot be read or written.
    """
    if make:
        make_directory(path.parent, owner)
    with locked(path.parent):
        acl = Acl.read(path)
        before = acl.entries
        yield acl
        _write_back(acl, _comments(before), owner)


def forget_comments(path: Path, keys: Iterable[str]) -> None:
    """Take out the comments of keys that are not in this ACL any more, or never came into it.

    Args:
        path: the ACL, which need not be there.
        keys: their fingerprints; one that is in the ACL keeps its comment.

    Raises:
        ConfigError: it is none.
        NotAllowedError, HostError: it or its comments cannot be read or written.
    """
    comments = path.with_name(COMMENTS)
    with suppress(NotFoundError), locked(path.parent):
        there = {entry.key.fingerprint for entry in Acl.read(path).entries if entry.key}
        _write_comments(comments, {*keys} - there, {}, None)


def known_names(directory: Path, shared: Iterable[Path] = _SHARED) -> dict[str, str]:
    """Names of keys by fingerprint, from the `.pub` files of this host: its own, and those that came with Guix."""
    names = {}
    for file in (file for folder in shared for file in sorted(folder.glob("*.pub"))):
        with suppress(OffloadError):
            names[read_public_key(file).fingerprint] = file.stem
    with suppress(OffloadError):
        names[read_public_key(directory / PUBLIC_KEY).fingerprint] = "the key of this directory"
    return names


def _read_named(file: str) -> PublicKey:
    try:
        return read_public_key(Path(file))
    except NotFoundError as exc:
        raise NotFoundError("is neither a fingerprint nor a file", subject=file, hint="offload guix acl list") from exc


def _own_entry(path: Path) -> list[Entry]:
    try:
        return [Entry((b"entry", read_public_key(path).sexp, _IMPORT))]
    except NotFoundError:
        return []


def _check_entry(path: Path, number: int, sexp: Sexp) -> Entry:
    if not isinstance(sexp, tuple) or sexp[:1] != (b"entry",):
        raise wrong(path, f"entry {number}", "is no entry: expected `(entry (public-key ...) (tag (guix import)))`")
    return Entry(sexp)


def _with_comments(path: Path, entries: list[Entry]) -> list[Entry]:
    # Not without those that cannot be read: whose a key is may be told there, and without a comment it is the user's own.
    lines = _comment_lines(path.with_name(COMMENTS))
    comments = dict(line.split(" ", 1) for line in lines if " " in line)
    return [Entry(entry.sexp, comments.get(entry.key.fingerprint, "") if entry.key else "") for entry in entries]


def _comment_lines(path: Path) -> list[str]:
    try:
        return read_whole(path, MAX_SIZE).decode("utf-8", "replace").splitlines()
    except NotFoundError:
        # It may be a link that leads nowhere.
        refuse_link(path)
        return []


def _comments(entries: Iterable[Entry]) -> dict[str, str]:
    """Fingerprint -> comment."""
    return {entry.key.fingerprint: entry.comment for entry in entries if entry.key and entry.comment}


def _write_back(acl: Acl, before: Mapping[str, str], owner: Owner | None) -> None:
    """Whatever stops us in between, no key is in the list without its comment, which may say that it is a guest's.

    So a new comment is written before the list, and an old one goes after it: one of a key that is not there says nothing.

    Args:
        before: the comments as they were read.
    """
    now = _comments(acl.entries)
    comments = acl.path.with_name(COMMENTS)
    if acl.changed:
        refuse_link(acl.path)
    if now != before:
        _write_comments(comments, (), now, owner)
    if acl.changed:
        replace(acl.path, acl.text, MODE, owner)
    if now != before:
        _write_comments(comments, before.keys() - now.keys(), now, owner)


def _write_comments(path: Path, gone: Collection[str], now: Mapping[str, str], owner: Owner | None) -> None:
    """Only what has changed: the other lines stay where they are, also those of keys that are not in the ACL."""
    refuse_link(path)
    before = {line.partition(" ")[0]: line for line in _comment_lines(path) if " " in line}
    told = before | {fingerprint: f"{fingerprint} {comment}" for fingerprint, comment in now.items()}
    told = {fingerprint: line for fingerprint, line in told.items() if fingerprint not in gone}
    if told == before:
        return
    if told:
        replace(path, "".join(f"{line}\n" for line in told.values()).encode(), MODE, owner)
    else:
        remove(path)
