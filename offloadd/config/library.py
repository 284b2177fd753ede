"""The machines and images that are declared: those shipped with offload, overridden by name by the user's own.

A file that says `like: NAME` has each field that it does not set from that other one: of the same folder, or of an earlier
one, where it may have the same name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from offloadd.config.document import Document, read_document
from offloadd.config.load import check_document
from offloadd.errors import ConfigError, NotFoundError, Problem, UsageError
from offloadd.model.image import IMAGE_KINDS, FileImage, ImageDeclaration
from offloadd.model.kinds import KINDS
from offloadd.model.machine import Machine, VmMachine
from offloadd.model.system import SYSTEMS, nearest

V = TypeVar("V", bound=Machine | ImageDeclaration)
KindOf = Callable[[Document], type[V]]


@dataclass(frozen=True, kw_only=True)
class Library:
    """All that is declared.  `folders` holds, for each image, the folder that the sources of its files are relative to."""

    machines: dict[str, Machine]
    images: dict[str, ImageDeclaration]
    folders: dict[str, Path]

    def machine(self, name: str) -> Machine:
        return _find(self.machines, self._alias(name), "machine")

    def _alias(self, name: str) -> str:
        """Guix calls each childhurd hurd-vm too."""
        other = re.sub(r"^hurd-vm(?=\d*$)", "childhurd", name)
        return other if name not in self.machines and other in self.machines else name

    def vm(self, name: str) -> VmMachine:
        """A machine that is a VM.

        Raises:
            NotFoundError: there is none of that name.
            UsageError: it is of another kind.
        """
        machine = self.machine(name)
        if not isinstance(machine, VmMachine):
            hint = f"it is of kind {machine.kind}; offload machine show {name}"
            raise UsageError("is no virtual machine", subject=name, hint=hint)
        return machine

    @property
    def vms(self) -> dict[str, VmMachine]:
        """The machines that are VMs."""
        return {name: machine for name, machine in self.machines.items() if isinstance(machine, VmMachine)}

    def image(self, name: str) -> ImageDeclaration:
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
    recipes: dict[str, ImageDeclaration] = {}
    declared: dict[str, Machine] = {}
    for folder in folders:
        recipes |= _load_folder(folder / "images", _image_kind, images, problems)
        declared |= _load_folder(folder / "machines", _machine_kind, machines, problems)
    problems += _unknown_images(machines.values(), images)
    problems += _unfit_images(declared, machines, recipes)
    if problems:
        # What is wrong in a file is wrong in each that is like it.
        raise ConfigError(list(dict.fromkeys(problems)))
    return Library(machines=declared, images=recipes, folders={name: _folder(document) for name, document in images.items()})


def _folder(document: Document) -> Path:
    """What an image's files lie beside: who is like another one has its files from there."""
    return Path(document.source(("path",) if "path" in document.values else ("files",))).parent


def _unknown_images(machines: Iterable[Document], images: Collection[str]) -> Iterator[Problem]:
    for document in machines:
        image = document.values.get("image")
        if isinstance(image, str) and image not in images:
            message = f"there is no image called {image!r}; {nearest(image, images)}"
            line, file = document.line(("image",)), document.source(("image",))
            yield Problem(file=file, line=line, field="image", message=message)


def _unfit_images(
    declared: Mapping[str, Machine], documents: Mapping[str, Document], images: Mapping[str, ImageDeclaration]
) -> Iterator[Problem]:
    """Machines that ask of a disk of somebody else's what only our own images have."""
    for name, machine in declared.items():
        if not isinstance(machine, VmMachine) or not isinstance(images.get(machine.image), FileImage):
            continue
        wrong = {}
        if SYSTEMS[machine.systems[0]].qemu not in ("i386", "x86_64"):
            wrong["image"] = f"{machine.image} starts with a PC's firmware, which no {machine.systems[0]} has"
        if machine.warm:
            wrong["warm"] = f"must be 0: the image {machine.image} is a disk file, in which no builds of ours run"
        for field, message in wrong.items():
            document = documents[name]
            yield Problem(file=document.source((field,)), line=document.line((field,)), field=field, message=message)


def _machine_kind(document: Document) -> type[Machine]:
    return _kind(document, KINDS, "machine")


def _image_kind(document: Document) -> type[ImageDeclaration]:
    return _kind(document, IMAGE_KINDS, "image")


def _kind(document: Document, kinds: Mapping[str, type[V]], word: str) -> type[V]:
    """The class of a file's kind: what else it may hold depends on it.

    Raises:
        ConfigError: there is no such kind.
    """
    kind = document.values.get("kind")
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind]
    message = "is missing" if kind is None else f"{kind!r} is not a kind of {word}"
    message += f"; {nearest(str(kind), kinds)}"
    raise ConfigError([Problem(file=document.source(("kind",)), line=document.line(("kind",)), field="kind", message=message)])


def _load_folder(folder: Path, kind_of: KindOf[V], documents: dict[str, Document], problems: list[Problem]) -> dict[str, V]:
    """The values of the files that are right, by name; their documents, and those of wrong ones, are added to `documents`."""
    found: dict[str, V] = {}
    files: dict[str, str] = {}
    read = _read_folder(folder, problems)
    before, here = dict(documents), {_name(document): document for document in read}
    for document in read:
        name = _name(document)
        documents[name] = document
        try:
            documents[name] = document = _whole(document, here, before)
            value = check_document(document, kind_of(document), defaults={"name": name})
        except ConfigError as exc:
            problems += exc.problems
            continue
        file = Path(document.file).name
        if value.name in found:
            line, message = document.line(("name",)), f"{value.name!r} is the name of {files[value.name]} too"
            problems.append(Problem(file=document.file, line=line, field="name", message=message))
        found[value.name], files[value.name] = value, file
    return found


def _read_folder(folder: Path, problems: list[Problem]) -> list[Document]:
    documents = []
    # Hidden ones are editors' own.
    for path in sorted(path for path in folder.glob("*.yaml") if not path.name.startswith(".")):
        try:
            documents.append(read_document(path))
        except ConfigError as exc:
            problems += exc.problems
        except NotFoundError as exc:
            problems.append(Problem(file=str(path), line=0, field="", message=exc.what))
    return documents


def _name(document: Document) -> str:
    return str(document.values.get("name", Path(document.file).stem))


def _whole(
    document: Document, here: Mapping[str, Document], before: Mapping[str, Document], heirs: tuple[str, ...] = ()
) -> Document:
    """The document with what it has from the one that it is like.

    Args:
        here: those of its own folder, as they were read.
        before: those of earlier folders, whole.
        heirs: the names of those that are like this one.
    Raises:
        ConfigError: there is no such document.
    """
    if "like" not in document.values:
        return document
    like, heirs = str(document.values["like"]), (*heirs, _name(document))
    if like in here and like not in heirs:
        base = _whole(here[like], here, before, heirs)
    elif like in before:
        base = before[like]
    else:
        others = {*here, *before} - set(heirs)
        message = "is like itself" if like in heirs else f"there is nothing called {like!r} to be like; {nearest(like, others)}"
        raise ConfigError([Problem(file=document.file, line=document.line(("like",)), field="like", message=message)])
    merged = document.based_on(base, without=("name", "like"))
    return replace(merged, values={name: value for name, value in merged.values.items() if name != "like"})
