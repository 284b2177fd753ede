"""What a request asks for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from offloadd.model.recipe import BuildRecipe, BuildRequest, DebianBuild, Source


def recipe(**values: Any) -> BuildRecipe:
    return BuildRecipe.model_validate({"name": "thing", "steps": ["true"], **values})


@pytest.mark.parametrize(
    ("systems", "asked", "native", "chosen"),
    [
        ([], None, "x86_64-linux", "x86_64-linux"),
        ([], "arm64", "x86_64-linux", "aarch64-linux"),
        (["aarch64-linux", "x86_64-linux"], None, "x86_64-linux", "x86_64-linux"),
        (["aarch64-linux", "armhf-linux"], None, "x86_64-linux", "aarch64-linux"),
        (["i386", "amd64"], "i686-linux", "x86_64-linux", "i686-linux"),
    ],
)
def test_the_system_that_is_built_for(systems: list[str], asked: str | None, native: str, chosen: str) -> None:
    assert BuildRequest(recipe=recipe(systems=systems), system=asked).choose_system(native) == chosen


def test_a_system_that_the_recipe_does_not_name() -> None:
    request = BuildRequest(recipe=recipe(systems=["amd64"]), system="arm64")
    with pytest.raises(ValueError, match="the recipe is for x86_64-linux, not aarch64-linux"):
        request.choose_system("x86_64-linux")


def test_one_thing_is_built() -> None:
    for wrong in ({}, {"recipe": recipe(), "debian": DebianBuild(package="hello")}):
        with pytest.raises(ValidationError, match="give one of recipe and debian"):
            BuildRequest.model_validate(wrong)


@pytest.mark.parametrize(
    "source",
    [{"debian": "hello"}, {"debian": "hello=2.10-3"}, {"debian": "g++-12=12.2.0-14", "sha256": None}],
)
def test_debian_sources(source: dict[str, str]) -> None:
    assert Source.model_validate(source).debian == source["debian"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"debian": "hello", "sha256": "0" * 64}, "sha256 is not for Debian sources"),
        ({"url": "https://example.org/x.tar"}, "sha256 is missing"),
        ({"debian": "hello", "pypi": "a==1"}, "give one of"),
        ({}, "give one of"),
    ],
)
def test_wrong_sources(source: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Source.model_validate(source)


def test_the_date_may_be_found_by_itself() -> None:
    request = BuildRequest(recipe=recipe(date="auto"))
    assert request.asked_date == "auto"
    again = BuildRequest.model_validate(request.to_json())
    assert again == request


def test_options_come_before_the_recipe() -> None:
    asked = BuildRequest.model_validate({"recipe": recipe(date="2020-01-01", cpu="Nehalem"), "date": "auto", "cpu": "max"})
    assert (asked.asked_date, asked.asked_cpu) == ("auto", "max")
