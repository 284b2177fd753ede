"""Patterns of outputs by names alone: the same files as the build service finds by looking."""

from __future__ import annotations

import os
from contextlib import chdir
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offloadd.builder.patterns import OutputPattern

from ..guest_modules import load_guest_module

service = load_guest_module("build_service.patterns")

FILES = ("a", "b.o", ".hidden.o", "d/b.o", "d/.git/x", "d/e/b.o", "d/e/f/[a]", "e/^", "e/-", "e/!")
PARTS = (
    "*",
    "**",
    "?",
    "d",
    "e",
    "a",
    "b.o",
    "*.o",
    ".*",
    "[a-d]",
    "[!a]",
    "[^a]",
    "[",
    "[a]",
    ".",
    "d*",
    "*e*",
    "!",
    "f",
    "-",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("tree")
    for name in FILES:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    (top / "link").symlink_to("d")
    return top


def by_looking(top: Path, pattern: str) -> set[str]:
    """As `build_service.outputs.send_outputs` does."""
    parts = [part for part in os.fsencode(pattern).split(b"/") if part not in (b"", b".")]
    with chdir(top):
        return {os.fsdecode(path) for found in service.expand(parts) for path in service.tree(found) if path}


def by_name(top: Path, text: str) -> set[str]:
    pattern = OutputPattern(text)
    return {name for name in (str(path.relative_to(top)) for path in top.rglob("*")) if pattern.covers(name)}


@given(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
def test_both_ways_find_the_same(tree: Path, parts: list[str]) -> None:
    named = [part for part in parts if part != "."]
    # Names do not tell a file from a directory: what `a/**` means of a file `a` is the one difference.
    assume(named[-1:] != ["**"] or set(named) == {"**"})
    pattern = "/".join(parts)
    assert by_name(tree, pattern) == by_looking(tree, pattern)


@pytest.mark.parametrize(("text", "top"), [(".", True), ("**", True), ("*", False), ("a", False), ("**/*", False)])
def test_the_build_directory_itself(text: str, top: bool) -> None:
    assert OutputPattern(text).covers("") is top


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    assert not OutputPattern("*a" * 100 + "b").covers("a" * 200)
    assert not OutputPattern("**/a/" * 50 + "b").covers("/".join("a" * 200))
