"""From what is asked for to the requests that the daemon gets.

The daemon makes them: to load what checks recipes and options takes a command longer than to send them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offloadd.config.text import read_text
from offloadd.errors import NotFoundError, UsageError
from offloadd.model.asked import Asked, RecipeFile
from offloadd.model.quantity import format_date

if TYPE_CHECKING:
    from offloadd.client import Client

RECIPE = "offload.yaml"

Request = dict[str, Any]
"""A `BuildRequest` as JSON."""


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


def read_recipe(directory: Path) -> RecipeFile | None:
    """The directory's own recipe, when it has one.

    Raises:
        ConfigError: it cannot be read.
    """
    file = directory / RECIPE
    if not file.exists():
        return None
    # A name that is not UTF-8 has no form in JSON.
    return RecipeFile(path=os.fsencode(file).decode(errors="replace"), text=read_text(file))


def make_requests(client: Client, asked: Asked, directory: Path | None) -> Sequence[Request]:
    """The requests, one for each system type.

    Args:
        directory: the one that is sent: it may have to say how old it is.
    Raises:
        ConfigError: its recipe is wrong.
        UsageError: an option is wrong, with its name.
        NotFoundError: nothing says how old it is.
    """
    requests: list[Request] = client.post("/v1/requests", asdict(asked))
    if directory is not None and asked_date(requests[0]) == "auto":
        from offloadd.builder.release_date import release_date_of_directory

        found = release_date_of_directory(directory)
        released = {"date": format_date(found.date), "origin": found.origin}
        requests = [{**request, "released": released} for request in requests]
    return requests


def asked_date(request: Request) -> str | None:
    """As `BuildRequest.asked_date`."""
    return request["date"] or (request["recipe"] or {}).get("date")


def safe_name(name: str) -> str:
    """A directory's name as a recipe's name."""
    return re.sub(r"[^a-zA-Z0-9._+-]+", "-", name).lstrip("._+-")[:64] or "build"
