"""`offload quirks`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import typer

from offload_cli.complete import quirk_names, system_names
from offload_cli.connection import open_client
from offload_cli.show import ago, table
from offload_cli.terminal import print_json, print_text, say, terminal_width
from offload_cli.words import json_option

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_NONE = "Nothing is remembered: qemu-user is tried for every build."


@app.callback()
def _group() -> None:
    """What does not build under qemu-user.

    A build that died of the emulator, and not in a machine with a kernel of its own, is remembered by its name and system
    type, and goes to such a machine straight away.
    """


@app.command("list")
def list_(as_json: bool = json_option()) -> None:
    """List what is remembered.

    \b
    Example:
      offload quirks list
    """
    with open_client() as client:
        rows = client.get("/v1/quirks")
    if as_json:
        print_json(rows)
    else:
        print_text(quirks_table(rows, time.time(), terminal_width()) if rows else _NONE)


@app.command()
def forget(
    name: str | None = typer.Argument(None, metavar="NAME", autocompletion=quirk_names, help="Of the package; else all."),
    system: str | None = typer.Option(
        None, "-s", "--system", metavar="SYSTEM", autocompletion=system_names, help="Only for this system type."
    ),
    as_json: bool = json_option(),
) -> None:
    """Forget, so that qemu-user is tried again: after an update of QEMU, or of the package.

    \b
    Examples:
      offload quirks forget hello
      offload quirks forget -s arm64
    """
    from offloadd.config.requests import known_system

    query = {"name": name, "system": known_system(system, "--system") if system else None}
    with open_client() as client:
        gone = client.delete("/v1/quirks", **{field: value for field, value in query.items() if value is not None})
    if as_json:
        print_json(gone)
    else:
        count = gone["forgotten"]
        say(f"forgot {count} {'quirk' if count == 1 else 'quirks'}")


def quirks_table(rows: Iterable[Mapping[str, Any]], now: float, width: int | None = None) -> str:
    """`offload quirks list`; see `table` for `width`."""
    cells = ([row["name"], row["system"], ago(row["created"], now), row["build"], row["reason"]] for row in rows)
    return table(["NAME", "SYSTEM", "SINCE", "BUILD", "REASON"], cells, width)


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload quirks`."""
    commands.add_typer(app, name="quirks")
