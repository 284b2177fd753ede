"""Which registrations offload made.

They must be called as everybody calls them (mmdebstrap looks for `qemu-aarch64`), so the name does not tell.  Kept below /run:
it is gone when the registrations are.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offloadd.errors import HostError, NotAllowedError

Records = dict[str, int]
"""The name of a registration -> when it was made, in nanoseconds since 1970: another one of the same name is not ours."""

RECORDS = Path("/run/offload-binfmt.json")


def load_records(file: Path = RECORDS) -> Records:
    """What was kept; nothing when there is no such file or it is not what we wrote."""
    try:
        return _parse(file.read_text())
    except OSError:
        return {}


def _parse(text: str) -> Records:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return {name: made for name, made in found.items() if isinstance(made, int)} if isinstance(found, dict) else {}


@contextmanager
def open_records(file: Path = RECORDS) -> Iterator[Records]:
    """The records, to be changed; nobody else changes them, or registers anything through us, meanwhile.

    Raises:
        NotAllowedError: they belong to root.
        HostError: they cannot be written.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except PermissionError as exc:
        raise NotAllowedError("only root may write there", subject=str(file)) from exc
    except OSError as exc:
        raise HostError(f"cannot be written: {exc.strerror}", subject=str(file)) from exc
    with os.fdopen(descriptor, "r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        records = _parse(stream.read())
        try:
            yield records
        finally:
            stream.seek(0)
            stream.truncate()
            json.dump(records, stream)
