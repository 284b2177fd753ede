"""The results as a table for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import Row

_HEAD = """\
# Measured by `make bench`

Medians of one run, with the range and the number of rounds.  The two sides of a row were timed in turn, and the relation is the
median over the rounds; whatever else the machine did at that time is in them, so compare relations, not seconds.

"""


def write_report(rows: Sequence[Row], facts: Mapping[str, str], folder: Path) -> None:
    """Write `results.md` and `results.json` into `folder`."""
    (folder / "results.md").write_text(_HEAD + table(rows) + "\n" + _facts(facts))
    values = {"facts": dict(facts), "rows": [_row_json(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(values, indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| what | compared | ours | base | relation | target | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        base = row.base.shown() if row.base else ""
        cells = (row.name, row.compares, row.ours.shown(), base, _value(row, row.value), _target(row), _met(row))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _value(row: Row, value: float | None) -> str:
    if value is None:
        return ""
    if row.relation == "time":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.2f} ms"
    return f"{value:.2f}x" if row.relation == "ratio" else f"{value:+.2f} s"


def _target(row: Row) -> str:
    return "" if row.target is None else f"at most {_value(row, row.target)}"


def _met(row: Row) -> str:
    return "" if row.met is None else "yes" if row.met else "**no**"


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in facts.items())


def _row_json(row: Row) -> dict[str, Any]:
    base = row.base and {"name": row.base.name, "seconds": row.base.seconds, "median": row.base.median}
    return {
        "name": row.name,
        "compares": row.compares,
        "ours": {"name": row.ours.name, "seconds": row.ours.seconds, "median": row.ours.median},
        "base": base,
        "relation": row.relation,
        "value": row.value,
        "target": row.target,
        "met": row.met,
    }
