"""The machines and images that are declared: those shipped with offload, overridden by name by the user's own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from offloadd.config.document import Document, read_document
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
    # By name; the documents are there for wrong files too.
    images: dict[str, Document] = {}
    machines: dict[str, Document] = {}
    recipes: dict[str, ImageRecipe] = {}
    declared: dict[str, Machine] = {}
    for folder in folders:
        recipes |= _load_folder(folder / "images", ImageRecipe, images, problems)
        declared |= _load_folder(folder / "machines", Machine, machines, problems)
    problems += _unknown_images(machines.values(), images)
    if problems:
        raise ConfigError(problems)
    return Library(
        machines=declared, images=recipes, folders={name: Path(document.file).parent for name, document in images.items()}
    )


def _unknown_images(machines: Iterable[Document], images: Collection[str]) -> Iterator[Problem]:
    for document in machines:
        image = document.values.get("image")
        if isinstance(image, str) and image not in images:
            message = f"there is no image called {image!r}; {nearest(image, images)}"
            yield Problem(file=document.file, line=document.line(("image",)), field="image", message=message)


def _load_folder(folder: Path, kind: type[V], documents: dict[str, Document], problems: list[Problem]) -> dict[str, V]:
    """The values of the files that are right, by name; their documents, and those of wrong ones, are added to `documents`."""
    found: dict[str, V] = {}
    files: dict[str, str] = {}
    # Hidden ones are editors' own.
    for path in sorted(path for path in folder.glob("*.yaml") if not path.name.startswith(".")):
        try:
            document = read_document(path)
            documents[str(document.values.get("name", path.stem))] = document
            value = check_document(document, kind, defaults={"name": path.stem})
        except ConfigError as exc:
            problems += exc.problems
            continue
        except NotFoundError as exc:
            problems.append(Problem(file=str(path), line=0, field="", message=exc.what))
            continue
        if value.name in found:
            line, message = document.line(("name",)), f"{value.name!r} is the name of {files[value.name]} too"
            problems.append(Problem(file=str(path), line=line, field="name", message=message))
        found[value.name], files[value.name] = value, path.name
    return found
