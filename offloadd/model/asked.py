"""What a command line asks for, before anything of it is checked: the daemon makes requests of it.

Without pydantic, which takes a command longer to load than all else that it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A file's text, and its name for messages."""

    path: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What the command line says about the recipe."""

    command: tuple[str, ...] = ()
    """In place of the steps."""
    packages: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    requirements: Mapping[str, Any] = field(default_factory=dict)
    """What else it says of the machine and the environment, spelled as in the recipe."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One build, or several of the same for different system types.

    What is built is one of three: the recipe in `file` or `recipe`, with the changes; the command among the changes; `debian`.
    """

    file: RecipeFile | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """A recipe's values that stand in no file, or that the file may leave out; spelled as there."""
    debian: Mapping[str, Any] | None = None
    """The values of a `DebianBuild`."""
    changes: Changes = field(default_factory=Changes)
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else a request says, spelled as on the command line without the dashes; None: nothing is said."""
    systems: tuple[str, ...] = ()
    """The system types, in any spelling; none: one build for the type that fits."""
    systems_option: str = "--system"
    """Where those were given, for messages."""
    all_systems: bool = False
    """One for each type that the recipe names."""
