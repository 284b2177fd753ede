from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ConfigError
from offloadd.setup.include import include

OURS = Path("/etc/guix/offload/machines.scm")
FILE = Path("/etc/guix/machines.scm")
LOAD = '(if (file-exists? "/etc/guix/offload/machines.scm") (primitive-load "/etc/guix/offload/machines.scm") \'())'

forms = st.recursive(
    st.sampled_from(
        ['"a \\" ; ( #| b"', "x", "#t", "#\\(", "#\\space", '"\\\\"', "#u8(1 2)", "|a b|", "#{x (}#", "'()", "`(a ,@b)"]
    ),
    lambda inner: st.lists(inner, max_size=4).map(lambda items: f"({' '.join(items)})"),
)
spaces = st.sampled_from(
    [" ", "\n", "; a ( comment\n", "#| one #| two |# ) |#", "#;(left out) ", " #; #;a b\n", " #! ( #| !! \n!#", " #!fold-case "]
)


@given(st.lists(st.tuples(spaces, forms), max_size=4), spaces)
def test_the_last_form_is_wrapped_and_nothing_else_changed(parts: list[tuple[str, str]], end: str) -> None:
    before = "".join(space + form + " " for space, form in parts[:-1])
    space, last = parts[-1] if parts else ("", "")
    end = " " + end  # `x#;` is a symbol and a comment
    text = before + space + last + end
    found = include(text, OURS, FILE)
    if parts:
        assert found.startswith(f"{before}{space}(append\n{last}\n;")
        assert found.endswith(f"{LOAD}){end}")
    else:
        assert found.startswith(text)
        assert found.endswith(f"\n{LOAD}\n")
    assert include(found, OURS, FILE) == found


def test_a_file_that_is_not_there() -> None:
    assert include(None, OURS, FILE).splitlines()[-1] == LOAD


def test_a_form_that_ends_in_a_comment_does_not_swallow_ours() -> None:
    found = include("(list) ; end", OURS, FILE)
    assert found.splitlines() == ["(append", "(list)", found.splitlines()[2], f"{LOAD}) ; end"]


def test_a_script_s_first_line_is_a_comment() -> None:
    """Guile Reference Manual: "Block Comments"; the last form is not in it."""
    text = "#!/usr/bin/guile -s (\n!#\n(list) #! (not this) !#\n"
    assert include(text, OURS, FILE).startswith("#!/usr/bin/guile -s (\n!#\n(append\n(list)\n;")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("(list\n (a)", "1:1"),
        ("\n  (list))", "2:9"),
        ('(list "abc)', "1:7"),
        ("#| abc", "1:1"),
        ("(a) '", "1:5"),
        ("(a) #;", "1:7"),
        ("(a)\n#!/bin/guile (", "2:1"),
        ("(a) #!r6rsx b", "1:5"),
    ],
)
def test_what_is_no_scheme_is_refused(text: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"machines.scm:{place}: "):
        include(text, OURS, FILE)


@pytest.mark.parametrize("text", ["#;" * 5000 + " a" * 5001, "#;(" * 5000 + ")" * 5000 + "a", "(#;" * 5000 + "a" + ")" * 5000])
def test_comments_that_are_nested_too_deep_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"machines.scm:1:1\d\d: is nested more than 50 deep"):
        include(text, OURS, FILE)


def test_comments_are_nested_as_deep_as_elsewhere_and_follow_each_other_without_end() -> None:
    for text in ("#;" * 50 + " a" * 50, "#;(a) " * 5000, "(a) #;" * 5000 + "a\n"):
        last = "(a)" if text.startswith("(") else "b"
        assert f"(append\n{last}\n;" in include(text + ("" if last == "(a)" else " b"), OURS, FILE)


@given(st.text(alphabet="()[]\"'`,@#;!|\\{} \nax"))
def test_anything_is_read_or_refused(text: str) -> None:
    try:
        found = include(text, OURS, FILE)
    except ConfigError:
        return
    assert LOAD in found
