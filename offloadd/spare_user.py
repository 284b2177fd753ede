"""Users of this host that nobody else is: what runs as one and breaks out can touch nothing of anybody's.  For root alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from offloadd.errors import HostError

# systemd's range for users that exist as long as a service runs (its doc/UIDS-GIDS): nobody else's files have them.
FIRST_UID, LAST_UID = 61184, 65519

_reserved: set[int] = set()
"""Given away in this process, where no other process shows it yet."""


def find_spare_user(files: Iterable[Path] = ()) -> int | None:
    """The first user that no process and none of `files` belongs to; None where there is none, as in many containers."""
    # systemd's services, and what other daemons of ours have started, show as processes.
    taken = _reserved | _owners(files) | _owners(Path("/proc").glob("[0-9]*"))
    mapped = _mapped()
    free = (uid for uid in range(FIRST_UID, LAST_UID + 1) if uid not in taken and any(uid in users for users in mapped))
    return next(free, None)


@contextmanager
def reserve_user(subject: str) -> Iterator[int]:
    """A user for one build, which no other gets until the block is left.

    Raises:
        HostError: there is none.
    """
    uid = find_spare_user()
    if uid is None:
        hint = f"offloadd runs as root and needs one of {FIRST_UID} to {LAST_UID}; or run it as another user"
        raise HostError("no user of this host is free", subject=subject, hint=hint)
    _reserved.add(uid)
    try:
        yield uid
    finally:
        _reserved.discard(uid)


def _owners(paths: Iterable[Path]) -> set[int]:
    found = set()
    for path in paths:
        with suppress(OSError):  # a process that has just ended
            found.add(path.stat().st_uid)
    return found


def _mapped() -> list[range]:
    """The users that this user namespace has (user_namespaces(7), uid_map)."""
    lines = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return [range(int(first), int(first) + int(count)) for first, _, count in lines]
