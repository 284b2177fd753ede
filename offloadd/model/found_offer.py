"""Offers that are read from files of Guix and Nix: checked, and with a name of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from offloadd.errors import ConfigError, Problem
from offloadd.model.machine import BuildDaemon
from offloadd.model.offer import Offer


class FoundOffer(NamedTuple):
    """One that was read."""

    line: int
    """Counts from 1."""
    offer: Offer


class Placed(Protocol):
    """What stands somewhere in a file."""

    @property
    def line(self) -> int: ...
    @property
    def column(self) -> int: ...


class Place(NamedTuple):
    """A place in a file; both count from 1, and 0 is not known."""

    line: int
    column: int = 0


def check_found(
    entries: Iterable[tuple[Placed, dict[str, Any], Mapping[str, Placed]]],
    file: str,
    daemon: BuildDaemon,
    problems: list[Problem],
    taken: Set[str] = frozenset(),
) -> list[FoundOffer]:
    """The offers of the entries.

    Args:
        entries: where each stands, its fields by the names that `Offer` has, and where these stand when that is known.
        problems: what is wrong with the file already.
        taken: names that no machine may get.
    Raises:
        ConfigError: these problems, and those of all entries.
    """
    found: list[FoundOffer] = []
    problems, names = [*problems], {*taken}
    for place, fields, places in entries:
        name = _new_name(str(fields.get("host", "")), fields.get("port"), names)
        try:
            found.append(FoundOffer(place.line, Offer(machine=name, daemons=(daemon,), state="running", **fields)))
        except ValidationError as exc:
            problems += _problems(exc, file, place, places)
        names.add(name)
    if problems:
        raise ConfigError(problems)
    return found


def _problems(exc: ValidationError, file: str, place: Placed, places: Mapping[str, Placed]) -> Iterable[Problem]:
    for error in exc.errors(include_url=False):
        field = str(error["loc"][0]).replace("-", "_")
        where = places.get(field, place)
        message = "is missing" if error["type"] == "missing" else error["msg"].removeprefix("Value error, ")
        yield Problem(file=file, line=where.line, column=where.column, field=field.replace("_", "-"), message=message)


def _new_name(host: str, port: object, taken: Set[str]) -> str:
    """A machine's name made of its host's: of the characters that one may have, and another one's."""
    base = re.sub(r"[^a-zA-Z0-9._+-]", "-", host).lstrip("._+-")[:50] or "machine"
    candidates = [base, f"{base}-{port}" if isinstance(port, int) else base]
    number = 2
    while candidates[0] in taken:
        candidates.pop(0)
        if not candidates:
            candidates, number = [f"{base}-{number}"], number + 1
    return candidates[0]
