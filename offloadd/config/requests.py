"""From what a command line asks for to requests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from offloadd.config.document import Document, parse_document
from offloadd.config.load import check_document
from offloadd.errors import ConfigError, UsageError
from offloadd.model.asked import Asked, Changes, RecipeFile
from offloadd.model.base import Value
from offloadd.model.recipe import BuildRecipe, BuildRequest, DebianBuild
from offloadd.model.system import find_system

V = TypeVar("V", bound=Value)
_NAMES = {
    "steps": "the command",
    "packages": "--package",
    "outputs": "--output",
    "build-options": "--build-option",
    "check": "--no-check",
    "package": "the package",
}


def make_requests(asked: Asked) -> Sequence[BuildRequest]:
    """The requests, one for each system type.

    Raises:
        ConfigError: the recipe's file is wrong.
        UsageError: an option is wrong, with its name.
    """
    work: BuildRecipe | DebianBuild
    if asked.debian is not None:
        work = checked(DebianBuild, _given(asked.debian))
    else:
        work = find_recipe(asked.file, asked.recipe, asked.changes)
    kind = "recipe" if isinstance(work, BuildRecipe) else "debian"
    return [checked(BuildRequest, _given({kind: work, **asked.options, "system": name})) for name in _systems(work, asked)]


def find_recipe(file: RecipeFile | None, values: Mapping[str, Any], changes: Changes) -> BuildRecipe:
    """The file's recipe with the changes; or one made of `values` and the changes alone.

    Args:
        values: those of fields that the file does not set.
    Raises:
        ConfigError: the file is wrong.
        UsageError: an option is wrong.
    """
    if changes.command:
        values = {**values, "steps": [shlex.join(changes.command)]}
    if file is None or changes.command:
        # What is wrong with the command is not the file's fault.
        recipe = checked(BuildRecipe, values)
    if file is not None:
        recipe = check_document(parse_document(file.text, file.path), BuildRecipe, defaults=values)
    changed: dict[str, Any] = {
        **recipe.model_dump(by_alias=True),
        "steps": values["steps"] if changes.command else recipe.steps,
        "packages": (*recipe.packages, *changes.packages),
        "outputs": (*recipe.outputs, *changes.outputs),
        **changes.requirements,
        "features": (*recipe.features, *changes.requirements.get("features", ())),
    }
    return checked(BuildRecipe, changed)


def _systems(work: BuildRecipe | DebianBuild, asked: Asked) -> Sequence[str | None]:
    """The system types to build for; one that is None is open still."""
    if not asked.all_systems:
        return list(dict.fromkeys(known_system(name, asked.systems_option) for name in asked.systems)) or [None]
    if asked.systems:
        raise UsageError("--all-systems and --system do not go together")
    named = work.systems if isinstance(work, BuildRecipe) else ()
    if not named:
        raise UsageError("--all-systems: the recipe names no systems", hint="`systems: [x86_64-linux, ...]`, or -s")
    return named


def known_system(name: str, where: str) -> str:
    """The system type's own name.

    Args:
        where: what it was given as, for the message.
    Raises:
        UsageError: there is none of that name, with the nearest ones.
    """
    try:
        return find_system(name).name
    except ValueError as exc:
        raise UsageError(f"{where}: {exc}") from exc


def checked(kind: type[V], values: Mapping[str, Any], names: Mapping[str, str] = _NAMES) -> V:
    """A value from options; `names` says how a field is called on the command line, when not `--FIELD`.

    Raises:
        UsageError: one or more are wrong, each with its name.
    """
    try:
        return check_document(Document(file="", values=dict(values), lines={}), kind)
    except ConfigError as exc:
        wrong = []
        for problem in exc.problems:
            field = re.sub(r"\[\d+\]$", "", problem.field)
            wrong.append(f"{names.get(field, f'--{field}')}: {problem.message}")
        raise UsageError("; ".join(wrong)) from exc


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
