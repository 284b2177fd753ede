"""A file of ours, included from the user's own machines.scm, whose text stays as it is.

The value of the file is that of its last form, so this form is put into `(append FORM (load OURS))`.  Where it begins can be
found without understanding it: any code may stand in the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from offloadd.errors import ConfigError, Problem
from offloadd.guix.scheme import MAX_DEPTH, write

_NOTE = "; Added by `offload guix setup`: the machines of offload.  `offload guix setup --undo` takes it out."

# Guile's lexical syntax (Guile Reference Manual: "Scheme Syntax"), as far as it tells where a form begins and ends.
_TOKEN = re.compile(
    r"""(?P<space>\s+|;[^\n]*
        | \#!(?:r6rs|(?:no-)?fold-case|curly-infix(?:-and-bracket-lists)?)(?=[\s()\[\]";]|\Z)  # else it is a comment up to
        | \#!.*?!\#)  # this, which does not nest
    | (?P<block>\#\|)
    | (?P<skip>\#;)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<open>\#(?:vu8|[us]\d+|f\d+)?[(\[]|[(\[])
    | (?P<close>[)\]])
    | (?P<prefix>\#?(?:'|`|,@|,))
    | (?P<atom>\#\\(?:[A-Za-z0-9+-]+|.)|\#\{(?:[^}\\]|\\.|\}(?!\#))*\}\#|\|[^|]*\||(?!\#!)[^\s()\[\]";']+)""",
    re.VERBOSE | re.DOTALL,
)


def include(text: str | None, ours: Path, file: Path) -> str:
    """The text of machines.scm with `ours` included; as it is when that is so already.

    Args:
        text: what is in it now; None: there is none.
        file: its name, for the error.
    Raises:
        ConfigError: it is no Scheme that Guile reads.
    """
    name = write(str(ours))
    load = f"(if (file-exists? {name}) (primitive-load {name}) '())"
    text = text or ""
    if f"(primitive-load {name})" in text:
        return text
    found = _last_form(text, file)
    if found is None:
        between = "\n" if text and not text.endswith("\n") else ""
        return f"{text}{between}{_NOTE}\n{load}\n"
    start, end = found
    return f"{text[:start]}(append\n{text[start:end]}\n{_NOTE}\n{load}){text[end:]}"


def _last_form(text: str, file: Path) -> tuple[int, int] | None:
    """Where the last form of the file begins and ends; None when it has none."""
    last, at = None, 0
    while True:
        at = _skip_space(text, at, file)
        if at == len(text):
            return last
        end = _form_end(text, at, file)
        last, at = (at, end), end


def _skip_space(text: str, at: int, file: Path, depth: int = 0) -> int:
    """Where blanks and comments of all kinds end; `depth` is how many `#;` we are in."""
    while at < len(text):
        token = _token(text, at, file)
        if token.lastgroup == "space":
            at = token.end()
        elif token.lastgroup == "block":
            at = _block_end(text, at, file)
        elif token.lastgroup == "skip":
            at = _skipped_end(text, token, file, depth + 1)
        else:
            return at
    return at


def _skipped_end(text: str, token: re.Match[str], file: Path, depth: int) -> int:
    """Where the form ends that a `#;` comments out."""
    if depth > MAX_DEPTH:
        raise _error(text, token.start(), file, f"is nested more than {MAX_DEPTH} deep")
    return _form_end(text, _skip_space(text, token.end(), file, depth), file, depth)


def _form_end(text: str, at: int, file: Path, skipping: int = 0) -> int:
    start, depth = at, 0
    while at < len(text):
        token = _token(text, at, file)
        kind = token.lastgroup
        at = token.end()
        depth += (kind == "open") - (kind == "close")
        if depth < 0:
            raise _error(text, token.start(), file, "closes what was not opened")
        if kind == "block":
            at = _block_end(text, token.start(), file)
        elif kind == "skip":
            at = _skipped_end(text, token, file, skipping + 1)
        elif depth == 0 and kind not in ("space", "prefix"):
            return at
    raise _error(text, start, file, "the file ends within this")


def _token(text: str, at: int, file: Path) -> re.Match[str]:
    found = _TOKEN.match(text, at)
    if found is None:
        raise _error(text, at, file, "the file ends within this")
    return found


def _block_end(text: str, at: int, file: Path) -> int:
    """Where `#| ... |#` ends, which nests."""
    depth = 0
    for mark in re.finditer(r"#\||\|#", text[at:]):
        depth += 1 if mark[0] == "#|" else -1
        if depth == 0:
            return at + mark.end()
    raise _error(text, at, file, "the file ends within this")


def _error(text: str, at: int, file: Path, message: str) -> ConfigError:
    line = text.count("\n", 0, at) + 1
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    return ConfigError([Problem(file=str(file), line=line, column=column, field="", message=message)])
