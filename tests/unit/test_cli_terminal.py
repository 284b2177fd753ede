"""What of a build's output reaches a terminal."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_cli.terminal import Cleaner, clean, one_line

HOSTILE = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["\x1b[31m", "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;x\x1b\\", "\x1b", "\x1b[", "\x1bP", "\x9b31m", "\x07", "\x1bc"]
        ),
    ),
    max_size=20,
).map("".join)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain\ttext\r\n", "plain\ttext\r\n"),
        ("\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m"),
        ("a\x1b[2J\x1b[Hb", "ab"),
        ("a\x1b]0;title\x07b\x1b]52;c;c2VjcmV0\x1b\\c", "abc"),
        ("a\x1bPq#0\x1b\\b\x1bcc\x1b(0d", "abcd"),
        ("a\x00\x07\x08\x7f\x9b2Jb", "a2Jb"),
        ("ünïcode ✓", "ünïcode ✓"),
    ],
)
def test_only_text_and_colours_get_through(text: str, left: str) -> None:
    assert Cleaner().feed(text) == left


@given(HOSTILE)
def test_nothing_else_gets_through(text: str) -> None:
    left = re.sub(r"\x1b\[[0-9;:]*m", "", Cleaner().feed(text))
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", left)


@given(HOSTILE, st.lists(st.integers(min_value=0, max_value=200)))
def test_cuts_do_not_matter(text: str, cuts: list[int]) -> None:
    text += "."  # a sequence that never ends is held back
    cleaner, places = Cleaner(), sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    assert "".join(map(cleaner.feed, pieces)) == Cleaner().feed(text)


def test_a_control_string_without_end_does_not_swallow_the_log() -> None:
    cleaner = Cleaner()
    cleaner.feed("\x1b]0;" + "x" * 10_000)
    assert cleaner.feed("hello\n") == "hello\n"


def test_clean_has_no_colours() -> None:
    assert clean("\x1b[31mred\x1b[0m") == "red"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("make", "make"),
        ("make\n", "make"),
        ("if true\nthen x", "if true ..."),
        ("", ""),
        ("x" * 30, "x" * 19 + " ..."),
        ("a\x1b[2Jb", "ab"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text, 20) == line
