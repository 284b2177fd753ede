"""A machines.scm that is read without being evaluated."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NoReturn

from offloadd.errors import ConfigError, Problem
from offloadd.guix.scheme import Datum, Symbol, read_all
from offloadd.model.found_offer import FoundOffer, check_found
from offloadd.model.system import nearest


def read_guix(text: str, file: str, taken: Set[str] = frozenset()) -> list[FoundOffer]:
    """The machines of a machines.scm that is nothing but a list of them: it is read, never evaluated.

    What our machines have no counterpart of (compression, daemon-socket) is left out.

    Args:
        file: what problems are told of.
        taken: names that no machine may get.
    Raises:
        ConfigError: something else is in it, with line and column; all such places at once.
    """
    problems: list[Problem] = []
    found = []
    for entry in _entries(read_all(text, file), file):
        try:
            found.append(_read_entry(entry, file))
        except ConfigError as exc:
            problems += exc.problems
    return check_found(found, file, "guix", problems, taken)


def _fail(datum: Datum, file: str, message: str, field: str = "") -> NoReturn:
    raise ConfigError([Problem(file=file, line=datum.line, column=datum.column, field=field, message=message)])


def _call(datum: Datum, name: str) -> tuple[Datum, ...] | None:
    """What stands behind `name` when the datum is a form of that name."""
    match datum.value:
        case (Datum(value=Symbol() as head), *rest) if head == name:
            return tuple(rest)
    return None


def _entries(data: list[Datum], file: str) -> tuple[Datum, ...]:
    """The forms of a list: `(list X ...)` or `'()`."""
    if not data:
        raise ConfigError([Problem(file=file, line=1, field="", message="is empty: there is no list in it")])
    # The last is what Guix takes, but what stands before it is there for what it does.
    first = data[0]
    entries = _call(first, "list")
    if entries is None and (quoted := _call(first, "quote")) and quoted[0].value == ():
        entries = ()
    if entries is None:
        _fail(first, file, "this is code, and only (list (build-machine ...) ...) is read")
    if len(data) > 1:
        _fail(data[1], file, "more than one list")
    return entries


def _read_entry(entry: Datum, file: str) -> tuple[Datum, dict[str, Any], dict[str, Datum]]:
    """A machine: where it stands, its fields, and where these stand."""
    fields = _call(entry, "build-machine")
    if fields is None:
        _fail(entry, file, "this is code, and only (build-machine ...) is read in the list")
    values: dict[str, Any] = {"port": 22, "private_key": str(Path.home() / ".ssh/id_rsa")} | _DEFAULTS
    places: dict[str, Datum] = {}
    problems = []
    for field in fields:
        try:
            name, value = _read_field(field, file)
            if name in places:
                _fail(field, file, "is there twice", name)
        except ConfigError as exc:
            problems += exc.problems
        else:
            places[name] = field
            values |= {name: value} if value is not _IGNORED else {}
    if problems:
        raise ConfigError(problems)
    return entry, values, places


def _read_field(field: Datum, file: str) -> tuple[str, Any]:
    match field.value:
        case (Datum(value=Symbol() as name), Datum() as value):
            pass
        case _:
            _fail(field, file, "this is code, and only (FIELD VALUE) is read here")
    if name not in _FIELDS:
        _fail(field, file, f"no field of a build-machine; {nearest(name, _FIELDS)}", str(name))
    ours, expected, read = _FIELDS[name]
    found = read(value)
    if found is _WRONG:
        _fail(value, file, f"expected {expected}: code is not evaluated", str(name))
    return ours, found


_WRONG = object()
_IGNORED = object()


def _string(datum: Datum) -> object:
    return datum.value if isinstance(datum.value, str) and not isinstance(datum.value, Symbol) else _WRONG


def _integer(datum: Datum) -> object:
    return datum.value if isinstance(datum.value, int) and not isinstance(datum.value, bool) else _WRONG


def _number(datum: Datum) -> object:
    value = datum.value
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _WRONG
    except OverflowError:
        return _WRONG


def _threshold(datum: Datum) -> object:
    return None if datum.value is False else _number(datum)


def _strings(datum: Datum) -> object:
    items: tuple[Datum, ...] | None = _call(datum, "list")
    if items is None and (quoted := _call(datum, "quote")):
        inner = quoted[0].value
        items = inner if isinstance(inner, tuple) else None
    if items is None:
        return _WRONG
    strings = tuple(_string(item) for item in items)
    return _WRONG if _WRONG in strings else strings


def _system(datum: Datum) -> object:
    system = _string(datum)
    return system if system is _WRONG else (system,)


def _ignored(datum: Datum) -> object:
    return _IGNORED


_LIST = """a list of strings, '("..." ...)"""
_FIELDS: dict[str, tuple[str, str, Callable[[Datum], object]]] = {
    "name": ("host", "a string", _string),
    "port": ("port", "a whole number", _integer),
    "systems": ("systems", _LIST, _strings),
    "system": ("systems", "a string", _system),
    "user": ("user", "a string", _string),
    "host-key": ("host_key", "a string", _string),
    "private-key": ("private_key", "a string", _string),
    "parallel-builds": ("parallel_builds", "a whole number", _integer),
    "speed": ("speed", "a number", _number),
    "features": ("features", _LIST, _strings),
    "overload-threshold": ("overload_threshold", "a number or #f", _threshold),
    "compression": ("compression", "", _ignored),
    "compression-level": ("compression_level", "", _ignored),
    "daemon-socket": ("daemon_socket", "", _ignored),
}
"""Guix's field -> ours, what it holds, and how that is read."""

_DEFAULTS = {"parallel_builds": 1, "speed": 1.0, "features": (), "overload_threshold": 0.8}
"""Guix's."""
