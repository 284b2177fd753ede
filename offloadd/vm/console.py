"""A console's last lines, as a person may see them.

What a guest prints is not trusted: control characters never reach the terminal of whoever reads an error.
"""

from __future__ import annotations

import re
from pathlib import Path

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_c])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

TAIL_BYTES = 16 * 1024


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
