"""What reaches the terminal.  Guests are hostile: of what a build prints, only text and colours get through."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from typing import IO, Any, Protocol

from offloadd.errors import OffloadError, is_disk_full

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
# ECMA-48: control sequences, control strings (ended by BEL or ST), two-character escapes; then the other control characters.
_UNWANTED = re.compile(
    r"(\x1b\[[0-9;:]*m)"
    r"|\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)
_UNFINISHED = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)\Z")
_LONGEST = 4096


class Cleaner:
    """Takes the pieces of a text and gives them back without control sequences other than colours, newline, tab and CR."""

    def __init__(self) -> None:
        self._held = ""
        self.coloured = False

    def feed(self, text: str) -> str:
        """Clean one piece; a sequence that is cut in two waits for its rest."""
        text = self._held + text
        self._held = ""
        unfinished = _UNFINISHED.search(text)
        if unfinished:
            rest = unfinished[0]
            # A control string without end would swallow the log.
            self._held = rest if len(rest) <= _LONGEST else ""
            text = text[: unfinished.start()]
        self.coloured = self.coloured or _COLOUR.search(text) is not None
        return _UNWANTED.sub(lambda match: match[1] or "", text)


def clean(text: str) -> str:
    """A whole text, cleaned, without colours."""
    return _COLOUR.sub("", Cleaner().feed(text))


def one_line(text: str, limit: int = 200) -> str:
    """The first line of a text, cleaned; what was left out is marked."""
    lines = clean(text).strip().splitlines() or [""]
    first = lines[0].strip()
    shown = first if len(first) <= limit else first[: limit - 1]
    return shown if len(lines) == 1 and shown == first else f"{shown} ..."


def say(text: str) -> None:
    """Tell the user, on standard error."""
    sys.stderr.write(f"offload: {text}\n")
    sys.stderr.flush()


def say_error(error: OffloadError) -> None:
    say(clean(error.render()))


def print_text(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    # Now, while an error of it can still become an exit status.
    sys.stdout.flush()


def terminal_width() -> int | None:
    """The columns of the terminal that standard output is; None when it is none, and nobody's lines are to be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_json(value: Any) -> None:
    print_text(json.dumps(value, indent=2, ensure_ascii=False))


def discard(stream: IO[Any]) -> None:
    """Have what is still in it go nowhere: Python would complain once more when it flushes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class Log(Protocol):
    """Where a build's log goes."""

    def write(self, text: str) -> None:
        """Take a piece of it."""

    def end(self) -> None:
        """Others use the terminal now."""


class LogStream:
    """Where a build's log goes: raw, except to a terminal.

    When nobody reads it any more, or the disk is full, the build goes on.
    """

    def __init__(self, *, to_stderr: bool = False) -> None:
        stream = sys.stderr if to_stderr else sys.stdout
        self._stream = stream.buffer
        self._terminal = stream.isatty()
        self._cleaner = Cleaner()
        self.error: OSError | None = None
        """Why it takes no more."""
        self.line_open = False
        """Whether the last line has no end yet, on a terminal."""

    def write(self, text: str) -> None:
        if self._terminal:
            text = self._cleaner.feed(text)
        if not text or self.error:
            return
        self.line_open = self._terminal and not text.endswith("\n")
        try:
            self._stream.write(text.encode("utf-8", "replace"))
            self._stream.flush()
        except BrokenPipeError as exc:
            self.error = exc
        except OSError as exc:
            if not is_disk_full(exc):
                raise
            self.error = exc
            say("the log cannot be written any more: the disk is full")
            discard(self._stream)

    def end(self) -> None:
        """Give the terminal back: its own colours, at the beginning of a line."""
        if self._cleaner.coloured and self._terminal:
            self._stream.write(b"\x1b[0m")
        if self.line_open:
            self._stream.write(b"\n")
            self.line_open = False
        if not self.error:
            self._stream.flush()
