"""What an environment is made from, and its digest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offloadd.digest import json_digest

FORMAT = 1
"""Raised when the same recipe begins to give another environment."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentRecipe:
    """A Debian suite, an architecture (Debian's name), and the packages beside the essential ones."""

    suite: str
    architecture: str
    packages: tuple[str, ...] = ()
    """Sorted, each once; see `environment_recipe`."""

    @property
    def digest(self) -> str:
        return json_digest({"format": FORMAT, **self.to_json()})

    def to_json(self) -> dict[str, object]:
        return {"suite": self.suite, "architecture": self.architecture, "packages": list(self.packages)}

    def __str__(self) -> str:
        return f"environment {self.suite}/{self.architecture}"


def environment_recipe(suite: str, architecture: str, packages: Iterable[str] = ()) -> EnvironmentRecipe:
    """A recipe in its one normal form, so that the order in which packages are written makes no difference."""
    return EnvironmentRecipe(suite=suite, architecture=architecture, packages=tuple(sorted(set(packages))))
