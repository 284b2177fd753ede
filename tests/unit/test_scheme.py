"""Scheme as data: whatever goes in comes out the same, and nothing gets out of a string."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ConfigError
from offloadd.guix.scheme import MAX_DEPTH, Datum, Symbol, comment, read_all, write

NASTY = ['"', "\\", "\n", "\\\n  ", '")) (system "rm', "é", "日本", "\U0001f600", "\0", "\x7f", "a;b", "#|", "|#", "\\x41;"]
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(NASTY)).map("".join)
symbols = st.from_regex(r"[a-z][a-z0-9!?*<>=/+-]*", fullmatch=True).map(Symbol)
atoms = texts | symbols | st.booleans() | st.integers() | st.floats(allow_nan=False)
data = st.recursive(atoms, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=12)


def plain(datum: Datum) -> Any:
    return tuple(map(plain, datum.value)) if isinstance(datum.value, tuple) else datum.value


def typed(value: Any) -> Any:
    """With what `==` does not tell apart: 1, 1.0 and #t; a string and a symbol."""
    return tuple(map(typed, value)) if isinstance(value, tuple) else (type(value), value)


def read_one(text: str) -> Any:
    (datum,) = read_all(text, "f")
    return plain(datum)


@given(data)
def test_what_is_written_is_read_the_same(value: Any) -> None:
    text = write(value)
    assert text.isascii()
    assert "\n" not in text
    assert typed(read_one(text)) == typed(value)


@given(texts)
def test_nothing_gets_out_of_a_string(text: str) -> None:
    written = write(text)
    assert written[0] == written[-1] == '"'
    inner = written[1:-1].replace("\\\\", "").replace('\\"', "")
    assert '"' not in inner
    assert typed(read_one(f"({written} {written})")) == typed((text, text))


@given(st.text())
def test_nothing_gets_out_of_a_comment(text: str) -> None:
    line = comment(text)
    assert line.startswith(";")
    assert read_one(f"{line}\n(kept)") == ("kept",)
    assert line.isprintable()


@given(st.text(alphabet="()[]\"\\;#|'`, \nabx14.tf", max_size=60))
def test_whatever_is_read_ends_in_data_or_a_place(text: str) -> None:
    try:
        data = read_all(text, "f")
    except ConfigError as exc:
        (problem,) = exc.problems
        assert problem.file == "f"
        assert 1 <= problem.line <= text.count("\n") + 1
        assert problem.column >= 1
    else:
        assert all(1 <= datum.line <= text.count("\n") + 1 for datum in data)


def test_guiles_escapes_are_read() -> None:
    # Each as Guile 3.0 reads it; after \x two digits count, and what follows is text.
    assert read_one(r'"\a\b\f\n\r\t\v\0\\\"\|\("') == '\a\b\f\n\r\t\v\0\\"|('
    assert read_one(r'"\x41b\u00e9\U01f600"') == "Ab\xe9\U0001f600"
    assert read_one('"x\\\n   y"') == "x   y"


def test_comments_of_each_kind_are_passed_over() -> None:
    text = "; one\n#| two #| within |# |# (a #;(b #;c d) e ; f\n g)"
    assert read_one(text) == ("a", "e", "g")


def test_numbers_and_constants() -> None:
    assert typed(read_one("(1 -2 1.5 2. .5 1e3 1.0e-5 +inf.0 #t #false - + x1)")) == typed(
        (1, -2, 1.5, 2.0, 0.5, 1000.0, 1e-5, math.inf, True, False, Symbol("-"), Symbol("+"), Symbol("x1"))
    )


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("`(a)", 1, 1, "quasiquotation"),
        ("(a\n ,b)", 2, 2, "unquote"),
        ("(a\n  (b", 2, 3, "without its `)`"),
        ("(a]", 1, 1, "without its `)`"),
        ("(a))", 1, 4, "closes nothing"),
        ('(a "b', 1, 4, "a string without its end"),
        ('"\\q"', 1, 2, "no escape"),
        ('"\\x4"', 1, 2, "no escape"),
        ('"\\ud800"', 1, 2, "no character"),
        ("#| a", 1, 1, "without its `|#`"),
        ("(a . b)", 1, 4, "dotted pair"),
        ("#(1 2)", 1, 1, "is not read here"),
        ("#.(exit)", 1, 1, "is not read here"),
        ("(a '", 1, 4, "a quote of nothing"),
        ("(a #;)", 1, 4, "comments out nothing"),
        (f"(a {'9' * 5000})", 1, 4, "a number of more than"),
    ],
)
def test_what_is_no_data_is_refused_with_its_place(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("|", r"\|").replace(")", r"\)")) as caught:
        read_all(text, "m.scm")
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (line, column)
    assert str(problem).startswith(f"m.scm:{line}:{column}: ")


@pytest.mark.parametrize("opening", ["(", "'", "#;"])
def test_depth_is_bounded(opening: str) -> None:
    with pytest.raises(ConfigError, match=f"more than {MAX_DEPTH} deep"):
        read_all(opening * 100_000, "f")


@given(st.lists(st.sampled_from(["a", " ", "\n"]), max_size=40))
def test_places_count_from_one(parts: list[str]) -> None:
    text = "".join(parts)
    lines = text.split("\n")
    for datum in read_all(text, "f"):
        assert lines[datum.line - 1][datum.column - 1] == "a"


def test_size_is_bounded() -> None:
    with pytest.raises(ConfigError, match="longer than"):
        read_all(" " * (1 << 21), "f")


@pytest.mark.parametrize("value", ["\ud800", Symbol("a b"), Symbol(""), Symbol("1"), math.nan])
def test_what_has_no_text_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        write(value)
