"""From a directory and options to the request that the daemon gets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from offloadd.errors import ConfigError, NotFoundError, UsageError

if TYPE_CHECKING:
    from offloadd.model.base import Value
    from offloadd.model.recipe import BuildRecipe, BuildRequest, DebianBuild

V = TypeVar("V", bound="Value")
RECIPE = "offload.yaml"
_NAMES = {"steps": "the command", "packages": "--package", "outputs": "--output"}


def check_directory(directory: Path) -> Path:
    """The directory of the source, as an absolute path without links.

    Raises:
        NotFoundError, UsageError: it is none.
    """
    if not directory.exists():
        raise NotFoundError("no such directory", subject=str(directory))
    if not directory.is_dir():
        raise UsageError("is not a directory", subject=str(directory), hint="offload build DIR, with the source in DIR")
    return directory.resolve()


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What the command line says about the recipe."""

    command: tuple[str, ...] = ()
    """In place of the steps."""
    packages: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    requirements: Mapping[str, Any] = field(default_factory=dict)
    """What else it says of the machine and the environment, spelled as in the recipe."""


def find_recipe(directory: Path, changes: Changes) -> BuildRecipe:
    """The directory's own recipe with the changes; or one made from the changes alone.

    Raises:
        NotFoundError: neither is given.
        ConfigError: the file is wrong.
        UsageError: an option is wrong.
    """
    from offloadd.config.load import load_value
    from offloadd.model.recipe import BuildRecipe

    file = directory / RECIPE
    defaults: dict[str, Any] = {"name": safe_name(directory.name)}
    if changes.command:
        defaults["steps"] = [shlex.join(changes.command)]
        # What is wrong with it is not the file's fault.
        bare = checked(BuildRecipe, defaults, _NAMES)
    if file.exists():
        recipe = load_value(file, BuildRecipe, defaults=defaults)
    elif changes.command:
        recipe = bare
    else:
        hint = f"write one, or say what is to be run: offload build {shlex.quote(str(directory))} -- COMMAND"
        raise NotFoundError(f"holds no {RECIPE}", subject=str(directory), hint=hint)
    values: dict[str, Any] = {
        **recipe.model_dump(by_alias=True),
        "steps": defaults.get("steps", recipe.steps),
        "packages": (*recipe.packages, *changes.packages),
        "outputs": (*recipe.outputs, *changes.outputs),
        **changes.requirements,
        "features": (*recipe.features, *changes.requirements.get("features", ())),
    }
    return checked(BuildRecipe, values, _NAMES)


def make_request(work: BuildRecipe | DebianBuild, options: Mapping[str, Any]) -> BuildRequest:
    """The request; `options` are spelled as on the command line, without the dashes.

    Raises:
        UsageError: one of them is wrong, with its name.
    """
    from offloadd.model.recipe import BuildRecipe, BuildRequest

    given = {name: value for name, value in options.items() if value is not None}
    kind = "recipe" if isinstance(work, BuildRecipe) else "debian"
    return checked(BuildRequest, {kind: work, **given}, {})


def checked(kind: type[V], values: dict[str, Any], names: Mapping[str, str]) -> V:
    """A value from options; `names` says how a field is called on the command line, when not `--FIELD`.

    Raises:
        UsageError: one is wrong, with its name.
    """
    from offloadd.config.document import Document
    from offloadd.config.load import check_document

    try:
        return check_document(Document(file="", values=values, lines={}), kind)
    except ConfigError as exc:
        wrong = []
        for problem in exc.problems:
            field = re.sub(r"\[\d+\]$", "", problem.field)
            wrong.append(f"{names.get(field, f'--{field}')}: {problem.message}")
        raise UsageError("; ".join(wrong)) from exc


def safe_name(name: str) -> str:
    """A directory's name as a recipe's name."""
    return re.sub(r"[^a-zA-Z0-9._+-]+", "-", name).lstrip("._+-")[:64] or "build"
