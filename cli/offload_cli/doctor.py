"""`offload doctor`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from offload_cli.terminal import clean, print_json, print_text
from offload_cli.words import json_option
from offloadd.errors import HostError

if TYPE_CHECKING:
    from offloadd.doctor import Requirement

_COLOURS = {"ok": "32", "warning": "33", "missing": "31"}


def doctor(as_json: bool = json_option()) -> None:
    """Say what this host lacks, and which command mends it.

    Exit status 75 when something is missing; warnings are not.

    \b
    Example:
      offload doctor
    """
    from dataclasses import asdict

    from offloadd.doctor import examine_host

    found = examine_host()
    if as_json:
        print_json([asdict(requirement) for requirement in found])
    else:
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print_text("\n".join(doctor_lines(found, coloured=coloured)))
    if any(requirement.state == "missing" for requirement in found):
        raise typer.Exit(HostError.exit_status)


def doctor_lines(found: Iterable[Requirement], *, coloured: bool) -> list[str]:
    """Each requirement in one line, with what mends it below; a count at the end."""
    rows = list(found)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        state = row.state.ljust(len("missing"))
        shown = f"\x1b[{_COLOURS[row.state]}m{state}\x1b[0m" if coloured else state
        first, *more = clean(row.found).splitlines() or [""]
        lines.append(f"{shown}  {row.name.ljust(width)}  {first}")
        indent = " " * (len(state) + width + 4)
        lines += [f"{indent}{line}" for line in more]
        if row.state != "ok":
            lines += [f"{indent}for: {row.purpose}", *([f"{indent}mend: {clean(row.remedy)}"] if row.remedy else [])]
    return [*lines, _verdict(rows)]


def _verdict(rows: list[Requirement]) -> str:
    missing = [row.name for row in rows if row.state == "missing"]
    return f"Missing: {', '.join(missing)}." if missing else "Everything that offload needs is there."


def add_to(commands: typer.Typer) -> None:
    """Add `offload doctor`."""
    commands.command()(doctor)
