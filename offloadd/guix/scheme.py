"""Scheme as data: what Guile's `read` makes of a text, and the text of a datum.  Nothing is ever evaluated.

The lexical syntax is that of Guile 3.0's reader with its default options (Guile Reference Manual: "String Syntax", "Comments",
"Block Comments"): in a string `\\x` has exactly two hex digits, `\\u` four and `\\U` six.  Forms that no list of machines needs
are refused: quasiquotation, vectors, characters, keywords, dotted pairs.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from offloadd.errors import ConfigError, Problem

MAX_DEPTH = 50
MAX_DIGITS = 1000
"""Of a number; Python itself reads up to 4300."""
MAX_SIZE = 1 << 20
"""Characters: a file of a thousand machines has half of it."""


class Symbol(str):
    """A name; a `str` is a string."""

    __slots__ = ()


Value: TypeAlias = "str | int | float | bool | Symbol | Sequence[Value]"
"""What can be written."""


@dataclass(frozen=True)
class Datum:
    """What was read, and where: lines and columns count from 1, columns in characters."""

    value: str | int | float | bool | Symbol | tuple[Datum, ...]
    line: int
    column: int


# Printing

_NAMED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_PLAIN_SYMBOL = re.compile(r"[a-zA-Z!$%&*/:<=>?^_~][a-zA-Z0-9!$%&*/:<=>?^_~+.@-]*")


def write(value: Value) -> str:
    """The text of a datum on one line, in ASCII: it is read alike under every locale.

    Raises:
        ValueError: a character or symbol that has no such text, or a number that is none.
    """
    match value:
        case bool():
            return "#t" if value else "#f"
        case Symbol():
            if not _PLAIN_SYMBOL.fullmatch(value):
                raise ValueError(f"no plain symbol: {value!r}")
            return str(value)
        case str():
            return f'"{"".join(map(_escape, value))}"'
        case float():
            return _write_float(value)
        case int():
            return str(value)
    return f"({' '.join(map(write, value))})"


def _write_float(value: float) -> str:
    if math.isnan(value):
        raise ValueError("not a number")
    return repr(value) if math.isfinite(value) else f"{'-' if value < 0 else '+'}inf.0"


def _escape(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return character
    if 0xD800 <= code <= 0xDFFF:
        raise ValueError(f"U+{code:04X} is no character")
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:06x}"


def comment(text: str) -> str:
    """A comment line without its newline; what would end it, or move a terminal, is replaced."""
    return ("; " + "".join(character if character.isprintable() else "?" for character in text)).rstrip()


# Reading

_SPACE = re.compile(r"[ \t\n\r\f\v]*")
_TOKEN = re.compile(r"""[^ \t\n\r\f\v()\[\]{}"';`,|]+""")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=e))(e[+-]?[0-9]+)?", re.IGNORECASE)
_CONSTANTS = {"#t": True, "#true": True, "#f": False, "#false": False, "+inf.0": math.inf, "-inf.0": -math.inf}
_REFUSED = {
    "`": "quasiquotation is code, not data",
    ",": "an unquote is code, not data",
    "{": "curly braces are not read here",
    "|": "symbols in bars are not read here",
}
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "0": "\0"} | {c: c for c in '"\\|/('}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 6}
_CLOSING = {"(": ")", "[": "]"}


def read_all(text: str, file: str) -> list[Datum]:
    """Every datum of a text.

    Args:
        file: what problems are told of.
    Raises:
        ConfigError: the text is no data; with line and column.
    """
    reader = _Reader(text, file)
    if len(text) > MAX_SIZE:
        reader.fail(0, f"is longer than {MAX_SIZE} characters")
    found = []
    while (datum := reader.datum(0)) is not None:
        found.append(datum)
    if reader.position < len(text):
        reader.fail(reader.position, f"a `{text[reader.position]}` that closes nothing")
    return found


class _Reader:
    def __init__(self, text: str, file: str) -> None:
        self.position = 0
        self._text = text
        self._file = file
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]

    def fail(self, position: int, message: str) -> NoReturn:
        line, column = self._place(position)
        raise ConfigError([Problem(file=self._file, line=line, column=column, field="", message=message)])

    def datum(self, depth: int) -> Datum | None:
        """The next datum; None before a closing parenthesis and at the end."""
        if depth > MAX_DEPTH:
            self.fail(self.position, f"is nested more than {MAX_DEPTH} deep")
        self._skip(depth)
        begin = self.position
        match self._peek():
            case "" | ")" | "]":
                return None
            case "(" | "[" as opening:
                value: str | int | float | bool | Symbol | tuple[Datum, ...] = self._list(opening, depth)
            case '"':
                value = self._string()
            case "'":
                self.position += 1
                quoted = self.datum(depth + 1) or self.fail(begin, "a quote of nothing")
                value = (Datum(Symbol("quote"), *self._place(begin)), quoted)
            case character if character in _REFUSED:
                self.fail(begin, _REFUSED[character])
            case _:
                value = self._token()
        return Datum(value, *self._place(begin))

    def _peek(self, count: int = 1) -> str:
        return self._text[self.position : self.position + count]

    def _place(self, position: int) -> tuple[int, int]:
        line = bisect_right(self._lines, position)
        return line, position - self._lines[line - 1] + 1

    def _skip(self, depth: int) -> None:
        """White space and comments, each of the three kinds."""
        while True:
            match = _SPACE.match(self._text, self.position)
            assert match is not None
            self.position = begin = match.end()
            if self._peek() == ";":
                end = self._text.find("\n", begin)
                self.position = len(self._text) if end < 0 else end
            elif self._peek(2) == "#|":
                self._skip_block()
            elif self._peek(2) == "#;":
                self.position += 2
                if self.datum(depth + 1) is None:
                    self.fail(begin, "a `#;` that comments out nothing")
            else:
                return

    def _skip_block(self) -> None:
        """From `#|` to its `|#`: they nest."""
        begin, open_blocks = self.position, 0
        while True:
            match self._peek(2):
                case "#|":
                    open_blocks += 1
                case "|#":
                    open_blocks -= 1
                case "":
                    self.fail(begin, "a `#|` without its `|#`")
                case _:
                    self.position += 1
                    continue
            self.position += 2
            if not open_blocks:
                return

    def _list(self, opening: str, depth: int) -> tuple[Datum, ...]:
        begin = self.position
        self.position += 1
        found = []
        while (datum := self.datum(depth + 1)) is not None:
            found.append(datum)
        if self._peek() != _CLOSING[opening]:
            self.fail(begin, f"a `{opening}` without its `{_CLOSING[opening]}`")
        self.position += 1
        return tuple(found)

    def _string(self) -> str:
        begin = self.position
        self.position += 1
        parts = []
        while (character := self._peek()) != '"':
            if not character:
                self.fail(begin, "a string without its end")
            self.position += 1
            parts.append(self._escaped() if character == "\\" else character)
        self.position += 1
        return "".join(parts)

    def _escaped(self) -> str:
        """What stands behind a backslash."""
        begin, character = self.position - 1, self._peek()
        self.position += 1
        if character == "\n":
            # Guile's default keeps the blanks of the next line.
            return ""
        if character in _ESCAPED:
            return _ESCAPED[character]
        digits = self._peek(_HEX_DIGITS.get(character, 0))
        if not re.fullmatch(r"[0-9a-fA-F]+", digits) or len(digits) != _HEX_DIGITS[character]:
            self.fail(begin, f"no escape of Guile's: \\{character}{digits}")
        self.position += len(digits)
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self.fail(begin, f"no character: \\{character}{digits}")
        return chr(code)

    def _token(self) -> str | int | float | bool | Symbol:
        begin = self.position
        match = _TOKEN.match(self._text, begin)
        if match is None:
            self.fail(begin, f"unexpected {self._peek()!r}")
        self.position, word = match.end(), match.group()
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if _INTEGER.fullmatch(word):
            if len(word) > MAX_DIGITS:
                self.fail(begin, f"a number of more than {MAX_DIGITS} digits")
            return int(word)
        if _DECIMAL.fullmatch(word):
            return float(word)
        if word == ".":
            self.fail(begin, "a dotted pair, where only lists are read")
        if word.startswith("#"):
            self.fail(begin, f"{word[:20]!r} is not read here")
        return Symbol(word)
