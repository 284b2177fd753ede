"""The newest entry of a debian/changelog: deb-changelog(5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MAX_ENTRY_BYTES = 256 * 1024
"""How much of a changelog is looked at; the newest entry is at its top."""
_TITLE = re.compile(r"(?P<source>[A-Za-z0-9][A-Za-z0-9+.-]*) \((?P<version>[^()\s]{1,100})\)[^;]*;.*")
_END = re.compile(r" -- .*<[^>]*> {1,2}(?P<date>\S.*)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry."""

    source: str
    version: str
    date: datetime
    """In UTC."""


def top_entry(changelog: bytes) -> Entry | None:
    """The first entry of the file that begins with `changelog`; None when it does not begin with a whole one."""
    lines = iter(changelog[:MAX_ENTRY_BYTES].decode(errors="replace").split("\n"))
    title = next((line for line in lines if line.strip()), "")
    match = _TITLE.fullmatch(title.rstrip())
    if match is None:
        return None
    # The next entry's title or our own end, whatever comes first.
    last = next((line.rstrip() for line in lines if line.startswith(" --") or _TITLE.fullmatch(line.rstrip())), "")
    end = _END.fullmatch(last)
    date = _parse_date(end["date"]) if end else None
    return Entry(source=match["source"], version=match["version"], date=date) if date else None


def _parse_date(text: str) -> datetime | None:
    """A date as mail has it (RFC 5322)."""
    try:
        date = parsedate_to_datetime(text)
        # Without a zone, or with -0000, it is in UTC.
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, TypeError, OverflowError):
        return None
