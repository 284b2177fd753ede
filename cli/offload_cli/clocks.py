"""How the machines' clocks look to a person, for `offload machine status`.  Pure functions: values in, lines out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from offload_cli.show import fitting_table, moment, shift
from offload_cli.terminal import one_line
from offloadd.model.quantity import format_duration, parse_date

_ON_PURPOSE_S = 60.0
"""A virtual machine's clock that is nearer than this to the host's was not shifted, whatever its file says."""
_WRONG_S = 120.0
"""The daemon does not build by a clock that is further off."""
_WIDTH = 100


def clocks_page(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """A row for each machine, and below what is wrong with some.

    Args:
        width: of the terminal; None for as wide as it comes.
    """
    lines = fitting_table([_cells(row) for row in rows], width, ("KIND", "LOAD"))
    notes = [note for row in rows for note in _notes(row, min(width or _WIDTH, _WIDTH))]
    return "\n".join([lines, *([""] if notes else []), *notes])


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    off, load = row["off_s"], row["load"]
    return {
        "NAME": str(row["name"]),
        "KIND": str(row["kind"]),
        "STATE": _state(row),
        "LOAD": "-" if load is None else f"{load:.2f}",
        "CLOCK": moment(row["clock"]),
        "OFF BY": "-" if off is None else _offset(off),
        "WHY": _why(row),
    }


def _state(row: Mapping[str, Any]) -> str:
    if row["mode"] != "online":
        return str(row["mode"])
    if row["fault"]:
        return "silent"
    return str(row["state"] or "ready")


def _offset(seconds: float) -> str:
    """The difference to what it should be: `3m05s ahead`; `<1s` is what the question itself may take in an emulated guest."""
    if abs(seconds) < 1:
        return "<1s"
    return f"{format_duration(abs(seconds))} {'behind' if seconds < 0 else 'ahead'}"


def _why(row: Mapping[str, Any]) -> str:
    """What the clock is compared with."""
    if row["expected"] is None:
        if row["state"] is None:
            return "not asked"
        if row["date"] is None:
            return "will be as the host's"
        here, there = datetime.fromtimestamp(row["now"], UTC), parse_date(row["date"])
        return f"will start at {row['date']}, shifted on purpose by {shift(there, here)}"
    if abs(row["expected"] - row["now"]) < _ON_PURPOSE_S:
        return "as the host's" if row["kind"] not in ("local", "binfmt") else "the host's"
    here, there = datetime.fromtimestamp(row["now"], UTC), datetime.fromtimestamp(row["expected"], UTC)
    return f"shifted on purpose by {shift(there, here)}"


def _notes(row: Mapping[str, Any], width: int) -> Iterable[str]:
    """What is wrong, each in lines that begin with the machine's name."""
    texts = [str(row["fault"])] if row["fault"] else []
    if row["off_s"] is not None and abs(row["off_s"]) > _WRONG_S:
        texts.append(f"its clock is {_offset(row['off_s'])}, and not on purpose: no build is run by it")
    for text in texts:
        line = f"{row['name']}: {one_line(text)}"
        yield from textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
