"""The machines and images that are declared: those shipped with offload, overridden by name by the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from offloadd.config.document import read_document
from offloadd.config.load import check_document
from offloadd.errors import ConfigError, NotFoundError, Problem
from offloadd.model.image import ImageRecipe
from offloadd.model.machine import Machine
from offloadd.model.system import nearest

V = TypeVar("V", Machine, ImageRecipe)


@dataclass(frozen=True, kw_only=True)
class Library:
    """All that is declared.  `folders` holds the folder of each image recipe: the sources of its files are relative to it."""

    machines: dict[str, Machine]
    images: dict[str, ImageRecipe]
    folders: dict[str, Path]

    def machine(self, name: str) -> Machine:
        return _find(self.machines, name, "machine")

    def image(self, name: str) -> ImageRecipe:
        return _find(self.images, name, "image")


def _find(known: dict[str, V], name: str, word: str) -> V:
    try:
        return known[name]
    except KeyError:
        raise NotFoundError(f"there is no {word} called {name!r}", hint=nearest(name, known)) from None


def load_library(folders: Iterable[Path]) -> Library:
    """Read `machines/*.yaml` and `images/*.yaml` below each folder; later folders override earlier ones by name.

    Raises:
        ConfigError: with every problem of every file.
    """
    problems: list[Problem] = []
    images: dict[str, tuple[ImageRecipe, Path, int]] = {}
    machines: dict[str, tuple[Machine, Path, int]] = {}
    for folder in folders:
        images |= _load_folder(folder / "images", ImageRecipe, problems)
        machines |= _load_folder(folder / "machines", Machine, problems)
    for machine, path, line in machines.values():
        if machine.image not in images:
            message = f"there is no image called {machine.image!r}; {nearest(machine.image, images)}"
            problems.append(Problem(file=str(path), line=line, field="image", message=message))
    if problems:
        raise ConfigError(problems)
    return Library(
        machines={name: entry[0] for name, entry in machines.items()},
        images={name: entry[0] for name, entry in images.items()},
        folders={name: entry[1].parent for name, entry in images.items()},
    )


def _load_folder(folder: Path, kind: type[V], problems: list[Problem]) -> dict[str, tuple[V, Path, int]]:
    found: dict[str, tuple[V, Path, int]] = {}
    # Hidden ones are editors' own.
    for path in sorted(path for path in folder.glob("*.yaml") if not path.name.startswith(".")):
        try:
            document = read_document(path)
            value = check_document(document, kind, defaults={"name": path.stem})
        except ConfigError as exc:
            problems += exc.problems
            continue
        except NotFoundError as exc:
            problems.append(Problem(file=str(path), line=0, field="", message=exc.what))
            continue
        if value.name in found:
            first = found[value.name][1].name
            line, message = document.line(("name",)), f"{value.name!r} is the name of {first} too"
            problems.append(Problem(file=str(path), line=line, field="name", message=message))
        found[value.name] = (value, path, document.line(("image",)))
    return found
