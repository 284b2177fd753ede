"""`offload machine`: all machines, of whatever kind."""

from __future__ import annotations

import time
from typing import Any

import typer

from offload_cli.complete import machine_names
from offload_cli.connection import open_client, patience
from offload_cli.export import export
from offload_cli.import_machines import import_
from offload_cli.phases import open_phases
from offload_cli.show_machine import check_lines, machine_page, machines_page
from offload_cli.terminal import print_json, print_text, say, terminal_width
from offload_cli.words import json_option, known_form
from offloadd.errors import DaemonError, TransientError, error_from_json

app = typer.Typer(help="All machines: what they are, and whether they work.", no_args_is_help=True, rich_markup_mode=None)
app.command("export")(export)
app.command("import")(import_)

_NAME = typer.Argument(metavar="NAME", callback=known_form, autocompletion=machine_names, help="The machine's name.")
_NAMES = typer.Argument(metavar="NAME...", autocompletion=machine_names, help="The machines' names.")


@app.command("list")
def list_(as_json: bool = json_option()) -> None:
    """List all machines: what they build for, whether they may and can, what they have to do.

    \b
    Example:
      offload machine list
    """
    with open_client() as client, patience("waiting for remote machines"):
        rows = client.get("/v1/machines")
    if as_json:
        print_json(rows)
    else:
        print_text(machines_page(rows, terminal_width()) if rows else "No machines are declared.")


@app.command()
def status(as_json: bool = json_option()) -> None:
    """Show what the machines' clocks say: those that are shifted on purpose, and how far each is off what it should be.

    Virtual machines that run and remote hosts are asked; nothing is started.

    \b
    Example:
      offload machine status
    """
    from offload_cli.clocks import clocks_page

    with open_client() as client, patience("asking the machines"):
        rows = client.get("/v1/clocks")
    if as_json:
        print_json(rows)
    else:
        print_text(clocks_page(rows, terminal_width()))


@app.command()
def show(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Show all that is known of a machine: its state, its facts, its description.

    \b
    Example:
      offload machine show binfmt
    """
    with open_client() as client:
        machine = client.get(f"/v1/machines/{name}")
    if as_json:
        print_json(machine)
    else:
        print_text(machine_page(machine, time.time()))


@app.command("test")
def try_(names: list[str] = _NAMES, as_json: bool = json_option()) -> None:
    """Try machines for real: reach them, run a command, send a file and get it back, look at clock, load and disk, build.

    A VM is booted for it, whether or not one runs, and thrown away.  Exit status 75 when a check fails.

    \b
    Examples:
      offload machine test local
      offload machine test build-vm tower
    """
    results = [_try(known_form(name), as_json=as_json) for name in names]
    if as_json:
        print_json(results if len(results) > 1 else results[0])
    failed = [result["machine"] for result in results if not result["ok"]]
    if failed:
        say(f"{', '.join(failed)}: not all is well")
        raise typer.Exit(TransientError.exit_status)


def _try(name: str, *, as_json: bool) -> dict[str, Any]:
    """One machine's checks, printed as they are done."""
    with open_client() as client, open_phases() as phases:
        heading = [] if as_json else [name]
        for event in client.stream("POST", f"/v1/machines/{name}/test"):
            match event.pop("event", None):
                case "phase":
                    phases.tell(f"{name}: {event.get('text', '')}", event.get("fraction"))
                case "check" if not as_json:
                    phases.pause()
                    print_text("\n".join([*heading, *check_lines(event)]))
                    heading = []
                case "error":
                    raise error_from_json(event)
                case "done":
                    return event
    raise DaemonError("ended in the middle of it", subject="offloadd", hint="offload daemon status")


@app.command()
def drain(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Let a machine finish what it has; it takes nothing new until `resume`.

    \b
    Example:
      offload machine drain build-vm
    """
    _set_mode(name, "drain", as_json=as_json)


@app.command()
def resume(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Let a machine take builds again, also one that was left alone because it failed.

    \b
    Example:
      offload machine resume build-vm
    """
    _set_mode(name, "resume", as_json=as_json)


@app.command()
def offline(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Leave a machine alone: it is not even talked to until `resume`.

    \b
    Example:
      offload machine offline tower
    """
    _set_mode(name, "offline", as_json=as_json)


def _set_mode(name: str, word: str, *, as_json: bool) -> None:
    with open_client() as client:
        row = client.post(f"/v1/machines/{name}/{word}")
    if as_json:
        print_json(row)
        return
    busy = row.get("busy") or 0
    rest = f"; {busy} {'build' if busy == 1 else 'builds'} still on it" if busy and row["mode"] != "online" else ""
    say(f"{name}: {row['mode']}{rest}")


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload machine`."""
    commands.add_typer(app, name="machine")
