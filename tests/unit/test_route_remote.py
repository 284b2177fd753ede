"""What a remote host, which has no environments, may be asked to build."""

from __future__ import annotations

from typing import Any

import pytest

from offloadd.daemon.work import find_needs
from offloadd.model.machine import LocalMachine, SshMachine
from offloadd.model.recipe import BuildRequest
from offloadd.route import MachineFacts, find_route

KEY = "ssh-ed25519 AAAA"
FACTS = MachineFacts(systems=("x86_64-linux",))


def passed_over(request: dict[str, Any], features: tuple[str, ...]) -> dict[str, str]:
    tower = SshMachine(
        kind="ssh",
        name="tower",
        systems=("x86_64-linux",),
        host="tower",
        host_key=KEY,
        private_key="/k",
        features=features,
    )
    local = LocalMachine(kind="local", name="local")
    needs = find_needs(BuildRequest.model_validate(request), "x86_64-linux", None)
    decision = find_route(needs, [tower, local], {"tower": FACTS, "local": FACTS}, 0.0)
    assert "local" not in decision.passed_over
    return decision.passed_over


def recipe(*packages: str) -> dict[str, Any]:
    return {"recipe": {"name": "p", "steps": ["true"], "packages": list(packages)}}


@pytest.mark.parametrize(
    ("packages", "features"), [((), ()), (("gcc",), ("gcc",)), (("gcc:amd64", "make=4.3-4"), ("make", "gcc", "other"))]
)
def test_what_its_owner_says_is_there(packages: tuple[str, ...], features: tuple[str, ...]) -> None:
    assert passed_over(recipe(*packages), features) == {}


def test_packages_of_which_nobody_knows() -> None:
    why = passed_over(recipe("gcc", "make", "perl"), ("make",))
    assert why == {"tower": "has no environments, and its features do not name gcc, perl"}


def test_debian_packages_need_an_environment() -> None:
    why = passed_over({"debian": {"package": "hello"}}, ("hello", "gcc"))
    assert why == {"tower": "has no environments, in which Debian packages are built"}
