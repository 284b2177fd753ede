"""Canonical S-expressions in all the ways in which they are written."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ConfigError
from offloadd.guix.sexp import MAX_DEPTH, MAX_SIZE, Sexp, advanced, canonical, parse_sexp

PUBLIC_KEY = b"""\
(public-key\x20
 (ecc\x20
  (curve Ed25519)
  (q #C99FE5D4BDC0D3EB5F23D23B79E9F9D5E1AAC0EE7A8E8E5C1B1C2E1F90E5FB3C#)
  )
 )
"""
words = st.text("abcXYZ019-./_:*+=", min_size=1).map(str.encode)
atoms = st.one_of(st.binary(max_size=12), words, st.text(max_size=8).map(str.encode))
lists = st.recursive(
    st.lists(atoms, max_size=4).map(tuple), lambda inner: st.lists(atoms | inner, max_size=4).map(tuple), max_leaves=12
)


def as_hexadecimal(atom: bytes) -> bytes:
    return b"#" + atom.hex(" ").encode() + b"#"


def as_base64(atom: bytes) -> bytes:
    return b"|" + base64.b64encode(atom) + b"|"


def as_octal(atom: bytes) -> bytes:
    return b'"' + b"".join(b"\\%03o" % byte for byte in atom) + b'"'


def as_escapes(atom: bytes) -> bytes:
    return b'"' + b"\\\r\n".join(b"\\x%02x" % byte for byte in atom) + b'"'


def verbatim(atom: bytes) -> bytes:
    return b"%d:%s" % (len(atom), atom)


ways = st.sampled_from([as_hexadecimal, as_base64, as_octal, as_escapes, verbatim])


def write(sexp: Sexp, draw: Callable[[st.SearchStrategy[Callable[[bytes], bytes]]], Callable[[bytes], bytes]]) -> bytes:
    if isinstance(sexp, bytes):
        return draw(ways)(sexp)
    return b"( " + b"\t\n".join(write(item, draw) for item in sexp) + b")"


@given(lists)
def test_what_is_written_is_read_back(sexp: tuple[Sexp, ...]) -> None:
    assert parse_sexp(advanced(sexp), "f") == sexp
    assert parse_sexp(canonical(sexp), "f") == sexp
    assert parse_sexp(b" {" + base64.encodebytes(canonical(sexp)) + b"}\n", "f") == sexp


@given(lists, st.data())
def test_every_way_to_write_it_is_read(sexp: tuple[Sexp, ...], data: st.DataObject) -> None:
    assert parse_sexp(write(sexp, data.draw), "f") == sexp


@given(st.binary(max_size=60) | st.text('()#|"{}[]\\ab09:; \n', max_size=40).map(str.encode))
def test_garbage_is_an_error_of_ours_or_has_a_meaning(data: bytes) -> None:
    try:
        sexp = parse_sexp(data, "f")
    except ConfigError:
        return
    assert parse_sexp(advanced(sexp), "f") == sexp


def test_the_text_is_libgcrypt_s() -> None:
    sexp = parse_sexp(PUBLIC_KEY, "f")
    assert isinstance(sexp[1], tuple)
    assert sexp[1][:2] == (b"ecc", (b"curve", b"Ed25519"))
    assert advanced(sexp) == PUBLIC_KEY
    one_line = b" ".join(PUBLIC_KEY.split()).replace(b"C99F", b"c99f")
    assert parse_sexp(one_line, "f") == sexp


@pytest.mark.parametrize(
    ("sexp", "text"),
    [
        ((), b"()\n"),
        (((),), b"(\n ()\n )\n"),
        ((b"a", (b"b",), b"c"), b"(a \n (b)\n c)\n"),
        ((b"a", b"1x", b"two words", b"", b"-"), b'(a "1x" "two words" "" -)\n'),
        ((b'it\'s "so"\\\n',), b'("it\\\'s \\"so\\"\\\\\\n")\n'),
        (("é".encode(), b"a\xa0", b"\x00"), b"(#C3A9# #61A0# #00#)\n"),
    ],
)
def test_how_atoms_and_lists_are_printed(sexp: Sexp, text: bytes) -> None:
    assert advanced(sexp) == text


@pytest.mark.parametrize(
    ("data", "line", "column", "what"),
    [
        (b"", 1, 1, "is empty"),
        (b"\n \n", 3, 1, "is empty"),
        (b"acl", 1, 1, "expected `(`"),
        (b"(acl\n  (entry", 2, 3, "not closed"),
        (b"(a)\n(b)", 2, 1, "after the end"),
        (b"(a)\n ; by hand", 2, 2, "after the end"),
        (b"(a\n ; by hand\n)", 2, 2, "comments are not part"),
        (b"(a [text/plain]b)", 1, 4, "display hints"),
        (b"(q #1234 5#)", 1, 4, "odd number"),
        (b"(q #12zz#)", 1, 4, "no hexadecimal"),
        (b"(q #12", 1, 4, "no `#` follows"),
        (b"(q |AAA|)", 1, 4, "no base64"),
        (b"(q\n |A%AA|)", 2, 2, "no base64"),
        (b'(q "abc)', 1, 4, "string is not closed"),
        (b'(q "a\\q")', 1, 6, "no escape sequence"),
        (b'(q "a\\400")', 1, 6, "no escape sequence"),
        (b"(q 9:abc)", 1, 4, "before the length"),
        (b"(q 03:abc)", 1, 4, "no length"),
        (b"(q 99999999999:abc)", 1, 4, "no length"),
        (b"(q 12ab)", 1, 4, "cannot begin with a digit"),
        (b"(q \xc3\xa9)", 1, 4, "the byte 0xc3"),
        (b"(q a,b)", 1, 5, "`,` cannot stand here"),
        (b"{KGE", 1, 1, "no `}` follows"),
        (b"{YQ==}", 1, 1, "is no list"),
        (b"\n{KGEp} x", 2, 8, "after the end"),
        (b"\n{KGFd}", 2, 1, "in {}: display hints"),
    ],
)
def test_errors_have_a_place(data: bytes, line: int, column: int, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sexp(data, "/etc/guix/acl")
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == ("/etc/guix/acl", line)
    assert problem.message.startswith(f"column {column}: ")
    assert what in problem.message


def test_depth_and_size_have_a_limit() -> None:
    assert parse_sexp(b"(" * MAX_DEPTH + b")" * MAX_DEPTH, "f")
    with pytest.raises(ConfigError, match="nested more than"):
        parse_sexp(b"(" * 100_000 + b")" * 100_000, "f")
    with pytest.raises(ConfigError, match="larger than"):
        parse_sexp(b"(" + b"a" * MAX_SIZE + b")", "f")
