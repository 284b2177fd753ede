"""The results as a table and a picture for people, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import Row, Series
from bench.picture import Bar, draw

_HEAD = """\
# Measured by `make bench`

Medians of one run, with the range and the number of rounds.  The two sides of a row were timed in turn, and the relation is the
median over the rounds; whatever else the machine did at that time is in them, so compare relations, not seconds.

"""
_PICTURE = """\
![Seconds from the start of a process to a guest that nobody has used before](results.svg)

"""


def write_report(rows: Sequence[Row], facts: Mapping[str, str], folder: Path) -> None:
    """Write `results.md`, `results.json` and, when there is something to draw, `results.svg` into `folder`."""
    bars = _bars(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(_HEAD + (_PICTURE if bars else "") + table(rows) + "\n" + _facts(facts))
    if bars:
        (folder / "results.svg").write_text(draw("From nothing to a fresh guest", bars))
    values = {"facts": dict(facts), "rows": [_row_json(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(values, indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| what | compared | ours | base | relation | target | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        base = row.base.shown() if row.base and row.base.seconds else ""
        ours = f"not measured: {row.why_not}" if row.why_not else row.ours.shown()
        cells = (row.name, row.compares, ours, base, _value(row, row.value), _target(row), _met(row))
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _bars(rows: Sequence[Row]) -> list[Bar]:
    """The rows that are drawn, and what they are compared with; the fastest first, those that could not be measured last."""
    bars = [Bar(row.name, tuple(row.ours.seconds), row.why_not) for row in rows if row.drawn]
    bases = {id(row.base): row.base for row in rows if row.drawn and row.base and row.base.seconds}
    bars += [Bar(base.name, tuple(base.seconds)) for base in bases.values()]
    return sorted(bars, key=lambda bar: bar.median if bar.seconds else float("inf"))


def _value(row: Row, value: float | None) -> str:
    if value is None:
        return ""
    if row.relation == "rate":
        return f"{value:.1f} a minute"
    if row.relation == "time":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.2f} ms"
    if row.relation == "ratio":
        return f"{value:.2f}x" if value >= 0.1 else f"{value:.4f}x"
    return f"{value:+.2f} s"


def _target(row: Row) -> str:
    return "" if row.target is None else f"at most {_value(row, row.target)}"


def _met(row: Row) -> str:
    return "" if row.met is None else "yes" if row.met else "**no**"


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in facts.items())


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "compares": row.compares,
        "why_not": row.why_not or None,
        "ours": _series_json(row.ours),
        "base": row.base and _series_json(row.base),
        "relation": row.relation,
        "value": row.value,
        "target": row.target,
        "met": row.met,
    }


def _series_json(series: Series) -> dict[str, Any]:
    return {"name": series.name, "seconds": series.seconds, "median": series.median if series.seconds else None}
