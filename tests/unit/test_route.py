"""Which machine takes a build."""

from __future__ import annotations

from typing import Any

import pytest

from offloadd.errors import NoMachineError
from offloadd.model.recipe import BuildRequest
from offloadd.route import find_route

from .plans import machine


def request(recipe: dict[str, Any] | None = None, **fields: Any) -> BuildRequest:
    return BuildRequest.model_validate({"recipe": {"name": "r", "steps": ["true"], **(recipe or {})}, **fields})


def test_the_first_by_name_whatever_the_order_of_the_files() -> None:
    machines = [machine("c"), machine("a"), machine("b")]
    for order in (machines, machines[::-1]):
        route = find_route(request(), order)
        assert route.machine.name == "a"
        assert route.passed_over == {"b": "a comes first", "c": "a comes first"}


def test_the_machine_that_was_asked_for() -> None:
    route = find_route(request(machine="b"), [machine("a"), machine("b")])
    assert route.machine.name == "b"
    assert route.passed_over == {"a": "b was asked for"}


def test_the_system_type() -> None:
    machines = [machine("a"), machine("b", systems=["i686-linux", "x86_64-linux"])]
    route = find_route(request({"systems": ["i686-linux"]}), machines)
    assert route.machine.name == "b"
    assert route.passed_over["a"] == "builds x86_64-linux, not i686-linux"


def test_a_date_that_only_one_clock_holds() -> None:
    machines = [machine("a", systems=["i686-linux", "x86_64-linux"]), machine("b")]
    route = find_route(request(date="2050-01-01"), machines)
    assert route.machine.name == "b"
    assert "2038-01-19" in route.passed_over["a"]
    assert find_route(request({"date": "2050-01-01"}, date="2020-01-01"), machines).machine.name == "a"


def test_nobody_can_and_every_reason_is_told() -> None:
    with pytest.raises(NoMachineError) as caught:
        find_route(request({"systems": ["aarch64-linux"]}), [machine("b"), machine("a")])
    assert caught.value.subject == "r"
    assert caught.value.detail == "a: builds x86_64-linux, not aarch64-linux\nb: builds x86_64-linux, not aarch64-linux"
    with pytest.raises(NoMachineError):
        find_route(request(), [])


def test_what_was_asked_for_comes_before_the_recipe() -> None:
    asked = request({"date": "2001-01-01", "cpu": "a", "timeout": "1h", "max-silent-time": 5}, cpu="b", timeout="2m")
    assert asked.asked_date is not None
    assert (asked.asked_date.year, asked.asked_cpu, asked.timeout_s, asked.max_silent_s) == (2001, "b", 120.0, 5.0)
    assert BuildRequest.model_validate(asked.to_json()) == asked
