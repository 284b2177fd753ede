"""A console's last lines, as a person may see them.

What a guest prints is not trusted: control characters never reach the terminal of whoever reads an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import trio

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_c])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

TAIL_BYTES = 16 * 1024
MAX_LOG_BYTES = 32 * 1024 * 1024
KEPT_LOG_BYTES = 1024 * 1024
CHECK_S = 5.0


async def bound_logs(logs: Callable[[], Iterable[Path]]) -> None:
    """Cut logs that grow over their limit down to their end, for as long as they are written: a guest prints what it likes.

    QEMU appends, so that it goes on behind what is left.

    Args:
        logs: says where they are now.
    """
    while True:
        await trio.sleep(CHECK_S)  # nothing tells that a file has grown
        for log in logs():
            with suppress(OSError):  # it is tried again
                await trio.to_thread.run_sync(_cut, log)


def _cut(log: Path) -> None:
    if log.stat().st_size <= MAX_LOG_BYTES:
        return
    with log.open("r+b") as file:
        file.seek(-KEPT_LOG_BYTES, 2)
        end = file.read(KEPT_LOG_BYTES)
        file.truncate(0)
        file.seek(0)
        file.write(b"[the beginning was too long to keep]\n" + end)


def clean(text: str) -> str:
    """`text` without escape sequences and control characters other than newline and tab."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def console_tail(log: Path, lines: int = 20) -> str:
    """The last lines of a console log, cleaned; empty when there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    kept = [line.rstrip() for line in clean(text).splitlines() if line.strip()]
    return "\n".join(kept[-lines:])
