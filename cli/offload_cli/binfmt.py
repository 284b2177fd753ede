"""`offload binfmt`.  It is about this host, so no daemon is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.complete import system_names
from offload_cli.show import table
from offload_cli.terminal import print_json, print_text, say, terminal_width
from offload_cli.words import json_option
from offloadd.errors import HostError, UsageError

if TYPE_CHECKING:
    from offloadd.binfmt.register import Outcome
    from offloadd.binfmt.status import Status

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_SYSTEMS = typer.Argument(
    None, metavar="ARCH", autocompletion=system_names, help="System types: arm64, s390x-linux, arm-linux-gnueabihf ..."
)


@app.callback()
def _group() -> None:
    """Other architectures on this host, through qemu-user.

    The kernel's binfmt_misc hands it their programs.  What is registered is for every program of the host, and gone when
    the host restarts; Debian's package qemu-user-binfmt registers at each start.
    """


@app.command()
def status(architectures: list[str] | None = _SYSTEMS, as_json: bool = json_option()) -> None:
    """Show which architectures can be built for here.

    And what runs their programs, who registered that, or why it is not usable.

    \b
    Examples:
      offload binfmt status
      offload binfmt status arm64 --json
    """
    from offloadd.binfmt.status import read_status
    from offloadd.model.system import SYSTEMS

    found = read_status()
    rows = [_row(found, system) for system in (_find(architectures) or [name for name in SYSTEMS if name.endswith("-linux")])]
    if as_json:
        print_json({"mounted": found.mounted, "enabled": found.enabled, "systems": rows})
    else:
        print_text(status_table(rows, terminal_width()))


@app.command()
def register(
    architectures: list[str] | None = _SYSTEMS,
    force: bool = typer.Option(False, "--force", help="Register anew, also instead of what somebody else registered."),
    as_json: bool = json_option(),
) -> None:
    """Let this host run programs of other architectures.

    Without ARCH: of all whose emulator is installed.  What works already stays, whoever registered it.  Only root may do this.

    \b
    Examples:
      sudo offload binfmt register arm64 armhf
      sudo offload binfmt register
    """
    from offloadd.binfmt.register import register

    outcomes = register(_find(architectures) or _installed(), force=force)
    _show(outcomes, "works already, registered by {owner}", as_json=as_json)


@app.command()
def unregister(
    architectures: list[str] | None = _SYSTEMS,
    force: bool = typer.Option(False, "--force", help="Also what somebody else registered."),
    as_json: bool = json_option(),
) -> None:
    """Take back what was registered.

    Without ARCH: all that offload registered.  Only root may do this.

    \b
    Examples:
      sudo offload binfmt unregister s390x
      sudo offload binfmt unregister
    """
    from offloadd.binfmt.register import unregister

    outcomes = unregister(_find(architectures) or _ours(), force=force)
    _show(outcomes, "is not registered", as_json=as_json)


def _find(names: Iterable[str] | None) -> list[str]:
    """The system types of these names, each once."""
    from offloadd.model.system import find_system

    try:
        return list(dict.fromkeys(find_system(name).name for name in names or ()))
    except ValueError as exc:
        raise UsageError(str(exc)) from exc


def _installed() -> list[str]:
    from offloadd.binfmt.emulator import HINT, find_emulated
    from offloadd.host import native_systems

    found = find_emulated(native_systems())
    if not found:
        raise HostError("no emulator of another architecture is installed", hint=HINT)
    return found


def _ours() -> list[str]:
    from offloadd.binfmt.status import read_status
    from offloadd.model.system import SYSTEMS

    entries = [entry for entry in read_status().entries if entry.ours]
    return [name for name in SYSTEMS if any(entry.covers(name) for entry in entries)]


def _row(found: Status, name: str) -> dict[str, Any]:
    """One system for `status`."""
    from offloadd.binfmt.status import find_fault
    from offloadd.host import native_systems
    from offloadd.model.system import SYSTEMS

    system = SYSTEMS[name]
    native = name in native_systems()
    entry = found.find(name)
    why = "" if native else find_fault(found, system)
    row: dict[str, Any] = {
        "system": name,
        "debian": system.debian,
        "native": native,
        "usable": not native and not why,
        "why": why,
    }
    if entry is not None:
        shown = ("name", "interpreter", "flags", "enabled", "owner")
        row["registration"] = {field: getattr(entry, field) for field in shown}
    return row


def status_table(rows: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """`offload binfmt status`; see `table` for `width`."""

    def cells(row: dict[str, Any]) -> list[str]:
        entry = row.get("registration", {})
        if row["native"]:
            state = "native"
        elif row["usable"]:
            state = "usable"
        else:
            state = "broken" if entry else "-"
        by = entry.get("owner", "-")
        return [row["system"], row["debian"], state, by, entry.get("flags", "-"), row["why"] or entry.get("interpreter", "")]

    return table(["SYSTEM", "DEBIAN", "STATE", "REGISTERED BY", "FLAGS", "RUN BY, OR WHY NOT"], map(cells, rows), width)


def _show(outcomes: Sequence[Outcome], kept: str, *, as_json: bool) -> None:
    """What became of each system; `kept` says it of one to which nothing was done."""
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])
        return
    if not outcomes:
        say("nothing is registered by offload")
    for outcome in outcomes:
        done = kept.format(owner=outcome.owner) if outcome.change == "kept" else outcome.change
        interpreter = f" ({outcome.interpreter})" if outcome.interpreter else ""
        say(f"{outcome.system}: {outcome.name} {done}{interpreter}")


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload binfmt`."""
    commands.add_typer(app, name="binfmt")
