"""What identifies an image: its recipe and every file of ours that goes into it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.digest import json_digest
from offloadd.errors import ConfigError, Problem
from offloadd.model.image import GuestFile, ImageRecipe
from offloadd.unchanged import Signature, is_settled, sign

FORMAT = 2
"""Raised when the same recipe begins to give another image."""


@dataclass(frozen=True, kw_only=True)
class GuestContent:
    """A file for the guest, read once, so that what was digested is what is installed."""

    path: str
    mode: int
    content: bytes


def read_guest_files(recipe: ImageRecipe, folder: Path) -> tuple[GuestContent, ...]:
    """The recipe's files, whose sources are relative to `folder`, each once.  Blocks: call it in a thread.

    Raises:
        ConfigError: with every file that cannot be read.
    """
    found: dict[str, GuestContent] = {}
    problems = []
    for file in recipe.files:
        try:
            for path, source in _expand(file, folder / file.source):
                # Of two with the same path the later one counts.
                found[path] = GuestContent(path=path, mode=int(file.mode, 8), content=source.read_bytes())
        except OSError as exc:
            source = Path(exc.filename or folder / file.source)
            problems.append(Problem(file=str(source), line=0, field=f"files: {file.path}", message=str(exc.strerror)))
    if problems:
        raise ConfigError(problems)
    return tuple(found.values())


def _expand(file: GuestFile, source: Path) -> Iterator[tuple[str, Path]]:
    """(path in the guest, file) of everything that the recipe's entry stands for."""
    if not source.is_dir():
        yield file.path, source
        return
    for entry in sorted(source.iterdir()):
        # Editors' own, and bytecode that an interpreter of the host's has left.
        if entry.name.startswith(".") or entry.name.endswith("~") or entry.name == "__pycache__":
            continue
        below = file.model_copy(update={"path": f"{file.path}/{entry.name}"})
        yield from _expand(below, entry)


def image_digest(recipe: ImageRecipe, files: Sequence[GuestContent]) -> str:
    """The digest of an image: 64 hexadecimal digits."""
    contents = [
        [file.path, file.mode, hashlib.sha256(file.content).hexdigest()] for file in sorted(files, key=lambda f: f.path)
    ]
    return json_digest({"format": FORMAT, "recipe": recipe.to_json(), "files": contents})


class Digests:
    """The digest of each image, worked out anew when its recipe or one of its files has changed.

    Each build asks for that of each machine's image.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, Path], tuple[ImageRecipe, Signature, str]] = {}

    def of(self, recipe: ImageRecipe, folder: Path) -> str:
        """As `image_digest` of what `read_guest_files` reads.  Blocks.

        Raises:
            ConfigError: a file cannot be read.
        """
        signature = _sign_files(recipe, folder)
        known = self._known.get((recipe.name, folder))
        if known is not None and signature is not None and known[:2] == (recipe, signature):
            return known[2]
        digest = image_digest(recipe, read_guest_files(recipe, folder))
        if signature is not None and is_settled(signature):
            self._known[recipe.name, folder] = (recipe, signature, digest)
        return digest


def _sign_files(recipe: ImageRecipe, folder: Path) -> Signature | None:
    """None when a file cannot be looked at: whoever reads it tells why."""
    try:
        return sign(source for file in recipe.files for _, source in _expand(file, folder / file.source))
    except OSError:
        return None
