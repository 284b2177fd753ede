"""The text of a file that somebody else may have written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from offloadd.errors import ConfigError, NotFoundError, Problem

MAX_BYTES = 1024 * 1024
"""A larger file is not one of ours; PyYAML would need minutes for it."""


def read_text(path: Path) -> str:
    """The whole file.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        return _read_bounded(path).decode("utf-8")
    except FileNotFoundError:
        raise NotFoundError("no such file", subject=str(path)) from None
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror or str(exc) if isinstance(exc, OSError) else f"not UTF-8 at byte {exc.start}"
        raise ConfigError([Problem(file=str(path), line=0, field="", message=reason)]) from exc


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def _read_bounded(path: Path) -> bytes:
    """A source tree may come from anybody: its recipe may be a link to a device or a fifo, which would be read for ever."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError([Problem(file=str(path), line=0, field="", message="is not a regular file")])
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError([Problem(file=str(path), line=0, field="", message=f"larger than {MAX_BYTES} bytes")])
    return data
