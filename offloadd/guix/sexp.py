"""Canonical S-expressions, in which Guix keeps its keys and its ACL (R. Rivest, "S-expressions", 1997, as libgcrypt has them).

An expression is a string of bytes or a tuple of expressions; how it was written is no part of it.  All of libgcrypt's ways to
write one are read: tokens, "strings", #hexadecimal#, |base64|, `3:abc`; and the transport form, {base64 of a canonical one}.
What libgcrypt takes and means nothing is refused: display hints, and text after the expression.
"""

from __future__ import annotations

import base64
import binascii
import re
import string
from typing import TypeAlias

from offloadd.errors import ConfigError, Problem

Sexp: TypeAlias = "bytes | tuple[Sexp, ...]"

MAX_SIZE = 1 << 20
"""Bytes.  An ACL of 5000 keys is as large."""
MAX_DEPTH = 64

_BLANK = re.compile(rb"[ \t\n\v\f\r]*")
_TOKEN = re.compile(rb"[A-Za-z\-./_:*+=][A-Za-z0-9\-./_:*+=]*")
_LENGTH = re.compile(rb"[0-9]+")
_ESCAPE = re.compile(rb"""\\(?:([btvnfr"'\\])|x([0-9A-Fa-f]{2})|([0-3][0-7]{2})|(\r\n|\n\r|\n|\r))""")
_PLAIN = re.compile(rb'[^"\\]*')
_ESCAPED = {b"b": b"\b", b"t": b"\t", b"v": b"\v", b"n": b"\n", b"f": b"\f", b"r": b"\r"}
_TO_ESCAPE = {value[0]: b"\\" + letter for letter, value in _ESCAPED.items()} | {
    byte: b"\\" + bytes([byte]) for byte in b"\"'\\"
}


def parse_sexp(data: bytes, file: str) -> tuple[Sexp, ...]:
    """The one list that `data` holds.

    Args:
        file: its name, for the error.

    Raises:
        ConfigError: it is not one list, or too large, or too deep.
    """
    reader = _Reader(data, file)
    if len(data) > MAX_SIZE:
        raise reader.error(f"is larger than {MAX_SIZE} bytes", 0)
    reader.skip_blanks()
    if reader.looks_at(b"{"):
        return _parse_transport(reader)
    if not reader.looks_at(b"("):
        raise reader.error("is no S-expression: expected `(`" if data.strip() else "is empty")
    found = reader.read_list(1)
    reader.skip_blanks()
    if reader.at < len(data):
        raise reader.error("there is more after the end of the expression")
    return found


def canonical(sexp: Sexp) -> bytes:
    """The canonical form: of one expression there is only one, so digests are taken of it."""
    if isinstance(sexp, bytes):
        return b"%d:%s" % (len(sexp), sexp)
    return b"(" + b"".join(map(canonical, sexp)) + b")"


def advanced(sexp: Sexp) -> bytes:
    """The text that libgcrypt prints (GCRYSEXP_FMT_ADVANCED), with its blanks before the ends of lines."""
    return _print(sexp, 1) + b"\n"


def _parse_transport(reader: _Reader) -> tuple[Sexp, ...]:
    start = reader.at
    inner = reader.read_base64(b"}")
    reader.skip_blanks()
    if reader.at < len(reader.data):
        raise reader.error("there is more after the end of the expression")
    if not inner.startswith(b"("):
        raise reader.error("what is in {} is no list", start)
    try:
        return parse_sexp(inner, reader.file)
    except ConfigError as exc:
        # Its lines and columns are of a text that nobody sees.
        what = exc.problems[0].message.partition(": ")[2]
        raise reader.error(f"in {{}}: {what}", start) from exc


class _Reader:
    """A place in a text, and what may stand there."""

    def __init__(self, data: bytes, file: str) -> None:
        self.data = data
        self.file = file
        self.at = 0

    def error(self, what: str, at: int | None = None) -> ConfigError:
        """The error, with line and column (both from 1, the column in bytes) of `at`, by default of here."""
        before = self.data[: self.at if at is None else at]
        line = before.count(b"\n") + 1
        column = len(before) - (before.rfind(b"\n") + 1) + 1
        return ConfigError([Problem(file=self.file, line=line, field="", message=f"column {column}: {what}")])

    def looks_at(self, text: bytes) -> bool:
        return self.data.startswith(text, self.at)

    def skip_blanks(self) -> None:
        self.at += len(self._take(_BLANK))

    def read_list(self, depth: int) -> tuple[Sexp, ...]:
        start = self.at
        if depth > MAX_DEPTH:
            raise self.error(f"is nested more than {MAX_DEPTH} deep")
        self.at += 1
        found: list[Sexp] = []
        while True:
            self.skip_blanks()
            if self.at >= len(self.data):
                raise self.error("this parenthesis is not closed", start)
            if self.looks_at(b")"):
                self.at += 1
                return tuple(found)
            found.append(self.read_list(depth + 1) if self.looks_at(b"(") else self._read_atom())

    def _read_atom(self) -> bytes:
        if token := self._take(_TOKEN):
            self.at += len(token)
            return token
        start, length = self.at, self._take(_LENGTH)
        self.at += len(length)
        if length and self.looks_at(b":"):
            return self._read_verbatim(length, start)
        # libgcrypt takes a length before the other forms, too, and does not look at it.
        match self.data[self.at : self.at + 1]:
            case b'"':
                return self._read_string()
            case b"#":
                return self._read_hexadecimal()
            case b"|":
                return self.read_base64(b"|")
        if length:
            raise self.error("a token cannot begin with a digit", start)
        raise self.error(self._describe_character())

    def _read_verbatim(self, length: bytes, start: int) -> bytes:
        # "0:" is in the standard; libgcrypt writes it and does not read it.
        if len(length) > 7 or (length.startswith(b"0") and length != b"0"):
            raise self.error("is no length", start)
        first = self.at + 1
        self.at = first + int(length)
        if self.at > len(self.data):
            raise self.error("ends before the length that is said here", start)
        return self.data[first : self.at]

    def _read_string(self) -> bytes:
        start, found = self.at, []
        self.at += 1
        while not self.looks_at(b'"'):
            plain = self._take(_PLAIN)
            self.at += len(plain)
            found.append(plain)
            if self.at >= len(self.data):
                raise self.error("this string is not closed", start)
            if self.looks_at(b"\\"):
                found.append(self._read_escape())
        self.at += 1
        return b"".join(found)

    def _read_escape(self) -> bytes:
        match = _ESCAPE.match(self.data, self.at)
        if match is None:
            raise self.error("is no escape sequence")
        self.at = match.end()
        letter, hexadecimal, octal, _ = match.groups()
        if letter:
            return _ESCAPED.get(letter, letter)
        if hexadecimal:
            return bytes([int(hexadecimal, 16)])
        # A newline after a backslash is no part of the string.
        return bytes([int(octal, 8)]) if octal else b""

    def _read_hexadecimal(self) -> bytes:
        start, digits = self.at, self._read_until(b"#")
        try:
            return bytes.fromhex(digits.decode("ascii"))
        except ValueError as exc:
            odd = all(digit in string.hexdigits.encode() for digit in digits)
            raise self.error("has an odd number of hexadecimal digits" if odd else "is no hexadecimal number", start) from exc

    def read_base64(self, end: bytes) -> bytes:
        start, text = self.at, self._read_until(end)
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as exc:
            raise self.error("is no base64", start) from exc

    def _read_until(self, end: bytes) -> bytes:
        """What stands between here and the delimiter, without blanks."""
        stop = self.data.find(end, self.at + 1)
        if stop < 0:
            raise self.error(f"no `{end.decode()}` follows that ends this")
        inner = self.data[self.at + 1 : stop]
        self.at = stop + 1
        return b"".join(inner.split())

    def _describe_character(self) -> str:
        byte = self.data[self.at]
        if byte == ord(";"):
            return "comments are not part of this format: Guix would refuse the file"
        if byte in b"[]":
            return "display hints are not understood"
        shown = f"`{chr(byte)}`" if 0x20 < byte < 0x7F else f"the byte 0x{byte:02x}"
        return f"{shown} cannot stand here"

    def _take(self, pattern: re.Pattern[bytes]) -> bytes:
        match = pattern.match(self.data, self.at)
        return match[0] if match else b""


def _print(sexp: Sexp, indent: int) -> bytes:
    if isinstance(sexp, bytes):
        return _print_atom(sexp)
    new_line = b"\n" + b" " * indent
    text, before = b"(", None
    for item in sexp:
        if isinstance(before, bytes):
            text += b" "
        if isinstance(item, tuple) or isinstance(before, tuple):
            text += new_line
        text += _print(item, indent + 1)
        before = item
    return text + (new_line if isinstance(before, tuple) else b"") + b")"


def _print_atom(atom: bytes) -> bytes:
    """As libgcrypt chooses (its suitable_encoding): numbers in hexadecimal, words as they are, other text as a string."""
    if _TOKEN.fullmatch(atom):
        return atom
    if atom and (atom[0] >= 0x80 or not all(map(_is_text, atom))):
        return b"#" + atom.hex().upper().encode() + b"#"
    return b'"' + b"".join(_TO_ESCAPE.get(byte, bytes([byte])) for byte in atom) + b'"'


def _is_text(byte: int) -> bool:
    # Not 0, unlike libgcrypt, which prints it as it is and so ends its own text there.
    return byte in _TO_ESCAPE or 0x20 <= byte < 0x7F or byte > 0xA0
