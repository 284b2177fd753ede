"""One YAML file with the line of each of its fields.

PyYAML is used in this file alone.  Its safe constructors make the plain values; the nodes are kept long enough to tell each
field's line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from offloadd.config.text import read_text
from offloadd.errors import ConfigError, Problem

FieldPath = tuple["str | int", ...]

MAX_NODES = 100_000
"""With aliases followed: a few lines of them can stand for more than fits into memory."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file's plain values, and where they stand.

    `lines` maps the path of a field (`("files", 0, "mode")`) to its line, counted from 1.
    """

    file: str
    values: dict[str, Any]
    lines: dict[FieldPath, int]
    inherited: Mapping[str, str] = field(default_factory=dict)
    """Field -> the file that sets it, where that is another one."""

    def source(self, path: FieldPath) -> str:
        """The file in which `path` stands."""
        return self.inherited.get(str(path[0]), self.file) if path else self.file

    def line(self, path: FieldPath) -> int:
        """The line of `path`, or of the nearest field around it that exists."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def based_on(self, base: Document, *, without: Collection[str]) -> Document:
        """This document with the fields of `base` that it does not set itself, but for those called `without`."""
        taken = {name: value for name, value in base.values.items() if name not in self.values and name not in without}
        return Document(
            file=self.file,
            values=taken | self.values,
            lines={path: line for path, line in base.lines.items() if path[0] in taken} | self.lines,
            inherited={name: base.source((name,)) for name in taken},
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without the surprises: `no` and `on` stay words, 22:22 is no number, wrong dates are ours to report."""


_ODD_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "timestamp")}

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _ODD_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.2's core schema for these two.
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
# Without a leading zero: the constructor would read 010 as eight.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^(?:0|[-+]?[1-9][0-9]*)$"), list("-+0123456789"))


def read_document(path: Path) -> Document:
    """Read one file.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it cannot be read, is no YAML, is no mapping, or names a key twice.
    """
    return parse_document(read_text(path), str(path))


def parse_document(text: str, file: str) -> Document:
    """As `read_document`, for a text that is there already; `file` is its name in messages."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = mark.line + 1 if mark else 0
        raise ConfigError([Problem(file=file, line=line, field="", message=f"not valid YAML: {exc.problem}")]) from exc
    except yaml.YAMLError as exc:
        raise ConfigError([Problem(file=file, line=0, field="", message=f"not valid YAML: {exc}")]) from exc
    except RecursionError as exc:
        raise ConfigError([Problem(file=file, line=0, field="", message="not valid YAML: nested too deeply")]) from exc
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([Problem(file=file, line=1, field="", message="expected `key: value` lines")])
    if not _finite(node):
        message = "nested too deeply or too large with its aliases followed"
        raise ConfigError([Problem(file=file, line=0, field="", message=message)])
    problems = list(_odd_keys(node, file, ()))
    if problems:
        raise ConfigError(problems)
    try:
        values = _construct(text)
    except (yaml.YAMLError, ValueError) as exc:
        mark = getattr(exc, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        what = getattr(exc, "problem", None) or str(exc)
        raise ConfigError([Problem(file=file, line=line, field="", message=f"not valid YAML: {what}")]) from exc
    return Document(file=file, values=values, lines=dict(_lines(node, ())))


def _construct(text: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with fewer implicit types
    return values


def _finite(node: yaml.Node) -> bool:
    """Whether walks over the tree end soon: an alias may stand for what it is a part of."""
    waiting = [(node, 0)]
    count = 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > 50 or count > MAX_NODES:
            return False
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in node.value]
    return True


def _odd_keys(node: yaml.Node, file: str, path: FieldPath) -> Iterator[Problem]:
    """Keys that stand twice, and those that are no scalars."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                yield Problem(file=file, line=line, field=field_name(path), message="a key must be a word")
                continue
            if key.value in seen:
                message = f"stands twice (first on line {seen[key.value]})"
                yield Problem(file=file, line=line, field=field_name((*path, key.value)), message=message)
            seen[key.value] = line
            yield from _odd_keys(value, file, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _odd_keys(item, file, (*path, index))


def _lines(node: yaml.Node, path: FieldPath) -> Iterator[tuple[FieldPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _lines(item, (*path, index))


def field_name(path: FieldPath) -> str:
    """`files[0].mode`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def dump_yaml(value: dict[str, Any]) -> str:
    """Plain values as YAML that `parse_document` reads back; the order of the keys is kept."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    return text
