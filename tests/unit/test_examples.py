"""The examples' recipes are right."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import yaml

from offloadd.model.recipe import BuildRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def read(name: str) -> BuildRecipe:
    return BuildRecipe.model_validate(yaml.safe_load((EXAMPLES / name / "offload.yaml").read_text()))


def test_time_trap() -> None:
    recipe = read("time-trap")
    assert recipe.date is None, "the date is the demonstration's to choose"
    assert recipe.outputs == ("dist/*",)
    assert not recipe.sources


def test_holidays() -> None:
    recipe = read("holidays")
    assert isinstance(recipe.date, datetime)
    assert datetime(2019, 7, 28, 17, 4, 8, tzinfo=UTC) < recipe.date < datetime(2020, 1, 1, tzinfo=UTC)
    [source] = recipe.sources
    assert source.pypi == f"holidays=={recipe.version}"


def test_mbedtls() -> None:
    recipe = read("mbedtls")
    assert recipe.date == "auto"
    [source] = recipe.sources
    assert source.debian == "mbedtls=2.28.3-1"
    assert recipe.steps[0].startswith("dpkg-source --no-check --extract mbedtls_2.28.3-1.dsc ")


def test_hello() -> None:
    recipe = read("hello")
    assert recipe.date is None
    assert not recipe.systems, "it is for any"
    assert recipe.outputs == ("dist/*",)
