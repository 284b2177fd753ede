"""From a document to a checked value; pydantic's complaints become ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from offloadd.config.document import Document, FieldPath, field_name, parse_document
from offloadd.errors import ConfigError, Problem
from offloadd.model.base import Value
from offloadd.model.system import nearest

V = TypeVar("V", bound=Value)


def parse_value(text: str, file: str, kind: type[V]) -> V:
    """A text as a `kind`.

    Args:
        file: its name in messages.
    Raises:
        ConfigError: it is no YAML, or with every field that is wrong.
    """
    return check_document(parse_document(text, file), kind)


def check_document(document: Document, kind: type[V], *, defaults: Mapping[str, Any] | None = None) -> V:
    """A document's values as a `kind`.

    Args:
        defaults: values for fields that it does not set.
    Raises:
        ConfigError: with every field that is wrong.
    """
    try:
        return kind.model_validate({**(defaults or {}), **document.values}, by_name=False, by_alias=True)
    except ValidationError as exc:
        raise ConfigError(list(_problems(exc, document, kind))) from exc


def _problems(exc: ValidationError, document: Document, kind: type[Value]) -> Iterable[Problem]:
    seen: set[tuple[int, str]] = set()
    errors = exc.errors(include_url=False)
    for error in errors:
        # Items that are wrong do not count for pydantic: a list of them alone is "empty" too.
        if error["type"] == "too_short" and any(other["loc"][:-1] == error["loc"] for other in errors):
            continue
        path = tuple(part for part in error["loc"] if part != "[key]")
        line, field = document.line(path), field_name(path)
        message = _message(error, path, kind)
        if (line, field) not in seen:
            seen.add((line, field))
            yield Problem(file=document.source(path), line=line, field=field, message=message)


def _message(error: Any, path: FieldPath, kind: type[Value]) -> str:
    match error["type"]:
        case "extra_forbidden":
            known = [field.alias or name for name, field in kind.model_fields.items()] if len(path) == 1 else []
            return f"unknown key; {nearest(str(path[-1]), known)}" if known else "unknown key"
        case "missing":
            return "is missing"
        case "string_pattern_mismatch":
            return f"{error['input']!r} does not have the form {error['ctx']['pattern']}"
        case "value_error":
            return str(error["ctx"]["error"])
        case "union_tag_invalid" | "literal_error":
            return f"{error['input']!r} is not one of {error['ctx'].get('expected', error['ctx'].get('expected_tags'))}"
        case "tuple_type":
            return f"expected a list, not {error['input']!r}"
        case "too_short":
            return "must not be empty"
        case "dict_type" | "model_type":
            return "expected `key: value` lines"
        case "invalid_key":
            return "unknown key"
        case _:
            return f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
