"""What identifies an image: its recipe and every file of ours that goes into it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.digest import json_digest
from offloadd.errors import ConfigError, Problem
from offloadd.model.image import ImageRecipe

FORMAT = 1
"""Raised when the same recipe begins to give another image."""


@dataclass(frozen=True, kw_only=True)
class GuestContent:
    """A file for the guest, read once, so that what was digested is what is installed."""

    path: str
    mode: int
    content: bytes


def read_guest_files(recipe: ImageRecipe, folder: Path) -> tuple[GuestContent, ...]:
    """The recipe's files, whose sources are relative to `folder`. Blocks: call it in a thread.

    Raises:
        ConfigError: with every file that cannot be read.
    """
    found, problems = [], []
    for file in recipe.files:
        try:
            content = (folder / file.source).read_bytes()
        except OSError as exc:
            problems.append(
                Problem(file=str(folder / file.source), line=0, field=f"files: {file.path}", message=str(exc.strerror))
            )
        else:
            found.append(GuestContent(path=file.path, mode=int(file.mode, 8), content=content))
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def image_digest(recipe: ImageRecipe, files: Sequence[GuestContent]) -> str:
    """The digest of an image: 64 hexadecimal digits."""
    contents = [
        [file.path, file.mode, hashlib.sha256(file.content).hexdigest()] for file in sorted(files, key=lambda f: f.path)
    ]
    return json_digest({"format": FORMAT, "recipe": recipe.to_json(), "files": contents})
