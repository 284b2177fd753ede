"""Real peers: chroots with Guix, Nix and OpenSSH."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .node import Node, open_node, open_root

MakeNode = Callable[..., Node]


@pytest.fixture(scope="session")
def chroot() -> Iterator[Path]:
    """The root file system of all nodes; made in a minute where the cache has none."""
    if os.geteuid() != 0:
        # Whoever cannot run them is told of each.
        pytest.skip("NOT TESTED against the real Guix and Nix: nodes are made of namespaces with many users; run it as root")
    with open_root() as root:
        yield root


@pytest.fixture(scope="module")
def make_node(chroot: Path) -> Iterator[MakeNode]:
    """Make nodes: `make_node("a", shared=[folder])`; they end with the module."""
    with ExitStack() as stack:
        yield lambda name, shared=(): stack.enter_context(open_node(chroot, name, shared))


@pytest.fixture(scope="module")
def node_a(make_node: MakeNode) -> Node:
    """The host side: nothing runs in it."""
    return make_node("a")


@pytest.fixture(scope="module")
def node_b(make_node: MakeNode) -> Node:
    """The build machine: nothing runs in it."""
    return make_node("b")
