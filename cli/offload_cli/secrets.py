"""`offload secrets`: the keys that a virtual machine gets when it starts.  Only their fingerprints are ever shown."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from offload_cli.complete import vm_names
from offload_cli.connection import open_client
from offload_cli.show import short_path, table
from offload_cli.terminal import print_json, print_text, say, terminal_width
from offload_cli.words import json_option, known_form
from offloadd.errors import CancelledError, UsageError
from offloadd.model.quantity import format_date

app = typer.Typer(help="The keys that virtual machines get when they start.", no_args_is_help=True, rich_markup_mode=None)

_MACHINE = typer.Argument(metavar="MACHINE", callback=known_form, autocompletion=vm_names, help="The machine's name.")
_WHAT = {
    "host": "its SSH host keys",
    "client": "the key that logs in to it",
    "guix": "the key that its Guix signs with",
}


@app.command()
def init(machine: str = _MACHINE, as_json: bool = json_option()) -> None:
    """Make what is missing of a machine's secrets: each file that is there stays as it is.

    A machine that starts does the same.  One that takes guix-daemon's builds gets Guix's keys too.

    \b
    Example:
      offload secrets init childhurd
    """
    with open_client() as client:
        view = client.post(f"/v1/machines/{machine}/secrets")
    if as_json:
        print_json(view)
        return
    for path in view["made"]:
        print_text(path)
    if not view["made"]:
        say("nothing to do: all are there")


@app.command()
def show(machine: str = _MACHINE, as_json: bool = json_option()) -> None:
    """Show a machine's secrets: files, modes, dates and fingerprints.

    \b
    Example:
      offload secrets show childhurd
    """
    with open_client() as client:
        view = client.get(f"/v1/machines/{machine}/secrets")
    if as_json:
        print_json(view)
    elif view["files"] or view["client"]:
        print_text(secrets_text(view, terminal_width()))
    else:
        say(f"{machine} has no secrets yet: its first start makes them, or `offload secrets init {machine}`")


@app.command()
def rotate(
    machine: str = _MACHINE,
    only: list[str] = typer.Option([], "--only", metavar="KIND", help="host, client or guix; by default all."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask."),
    as_json: bool = json_option(),
) -> None:
    """Make new secrets for a machine that does not run; the old ones are kept beside.

    \b
    Examples:
      offload secrets rotate childhurd
      offload secrets rotate childhurd --only client --yes
    """
    kinds = _kinds(only)
    if not yes:
        _ask(machine, kinds)
    with open_client() as client:
        view = client.post(f"/v1/machines/{machine}/secrets/rotate", {"kinds": kinds})
    if as_json:
        print_json(view)
        return
    print_text(secrets_text(view, terminal_width()))
    say(f"new: {', '.join(_WHAT[kind] for kind in view['kinds'])}; the old ones are in {view['backup']}")
    _tell_of_guix(view)


def _kinds(only: list[str]) -> list[str]:
    for kind in only:
        if kind not in _WHAT:
            raise UsageError(f"there is no such kind of secret, only {', '.join(_WHAT)}", subject=kind)
    return only or list(_WHAT)


def _ask(machine: str, kinds: list[str]) -> None:
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to be asked", subject=machine, hint="--yes does it without a question")
    say(f"{machine} gets new secrets: {', '.join(_WHAT[kind] for kind in kinds)}")
    if not typer.confirm("Go on?", err=True):
        raise CancelledError("nothing was changed", subject=machine)


def _tell_of_guix(view: dict[str, Any]) -> None:
    """guix-daemon of this host has copies, when it was set up."""
    if view["old_signing_key"]:
        say(f"if Guix of this host trusts the old key: sudo offload guix acl revoke {view['old_signing_key']}")
    if view["takes_guix"] and {"client", "guix"} & set(view["kinds"]):
        say(f"if Guix of this host sends builds there: sudo offload guix setup {view['machine']}")


_COLUMNS: list[str] = ["FILE", "MODE", "CHANGED", "FINGERPRINT"]


def secrets_text(view: dict[str, Any], width: int | None) -> str:
    """What goes into the guest, and what stays here."""
    parts = []
    if view["files"]:
        parts += [f"in the guest, from {short_path(Path(view['root']))}", table(_COLUMNS, _rows(view["files"], "name"), width)]
    if view["client"]:
        parts += ["", "only here: the key that logs in", table(_COLUMNS, _rows(view["client"], "path"), width)]
    if view["old"]:
        parts += ["", "old ones", *(short_path(Path(path)) for path in view["old"])]
    return "\n".join(parts)


def _rows(files: list[dict[str, Any]], name: str) -> list[list[str]]:
    """A file with several keys takes as many lines."""
    rows = []
    for file in files:
        changed = format_date(datetime.fromtimestamp(file["changed"], UTC))
        first, *others = file["fingerprints"] or ["-"]
        rows.append([short_path(Path(file[name])) if name == "path" else file[name], file["mode"], changed, first])
        rows += [["", "", "", other] for other in others]
    return rows


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload secrets`."""
    commands.add_typer(app, name="secrets")
