"""`offload template`: the saved guests that builds get clones of."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.complete import template_names, vm_names
from offload_cli.connection import open_client, show_work
from offload_cli.show_machine import templates_page
from offload_cli.terminal import print_json, print_text, say, terminal_width
from offload_cli.words import json_option, known_form
from offloadd.errors import NotFoundError
from offloadd.model.quantity import format_duration, format_size

if TYPE_CHECKING:
    from offloadd.model.template import TemplateRequest

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """The guests that were booted once and saved: each build in a virtual machine gets a fresh clone of one.

    A template is made for an image, a CPU model, a memory size and a QEMU, and is kept by its digest.  Builds make those
    that they need by themselves.
    """


@app.command("list")
def list_(as_json: bool = json_option()) -> None:
    """List the templates that were made, and say which are of no use any more.

    \b
    Example:
      offload template list
    """
    with open_client() as client:
        rows = client.get("/v1/templates")
    if as_json:
        print_json(rows)
    else:
        none = "No templates yet: a build in a virtual machine makes the one that it needs."
        print_text(templates_page(rows, time.time(), terminal_width()) if rows else none)


@app.command()
def build(
    machine: str = typer.Argument(
        metavar="MACHINE", callback=known_form, autocompletion=vm_names, help="The virtual machine whose builds are to use it."
    ),
    rebuild: bool = typer.Option(False, "--rebuild", help="Make it again, although it is there."),
    date: str | None = typer.Option(
        None, metavar="DATE", help="Of the builds that it is for: guests of that date have a CPU of that time."
    ),
    cpu: str | None = typer.Option(None, metavar="MODEL", help="Of the builds that it is for, in QEMU's words."),
    as_json: bool = json_option(),
) -> None:
    """Make a machine's template, unless it is there: then it is checked.

    \b
    Examples:
      offload template build build-vm
      offload template build build-vm --date 2012-06-01
    """
    request = _request(machine, date, cpu)
    began = time.monotonic()
    with open_client() as client:
        query = "?rebuild=true" if rebuild else ""
        made = show_work(client, f"/v1/templates/build{query}", f"template of {machine}", request.to_json())
    if as_json:
        print_json(made)
        return
    took = format_duration(time.monotonic() - began)
    say(f"template {made['digest'][:12]} is ready: {_words(made)}, {format_size(made['size_on_disk'])}, after {took}")


@app.command()
def rm(
    digest: str = typer.Argument(
        metavar="DIGEST", autocompletion=template_names, help="The template's digest, or the beginning of it."
    ),
    as_json: bool = json_option(),
) -> None:
    """Remove a template; a build that needs it makes it again, and guests that run are not disturbed.

    \b
    Example:
      offload template rm 952110ac
    """
    if not re.fullmatch(r"[0-9a-f]{1,64}", digest):
        raise NotFoundError("there is no such template", subject=repr(digest), hint="offload template list")
    with open_client() as client:
        gone = client.delete(f"/v1/templates/{digest}")
    if as_json:
        print_json(gone)
    else:
        say(f"removed {gone['digest'][:12]}: {_words(gone)}")


@app.command()
def gc(as_json: bool = json_option()) -> None:
    """Remove the templates that no machine would use now, and those that nobody has used for a month.

    \b
    Example:
      offload template gc
    """
    with open_client() as client:
        gone = client.post("/v1/templates/gc")
    if as_json:
        print_json(gone)
    else:
        say(f"removed {len(gone)} template{'s' if len(gone) != 1 else ''}")


def _request(machine: str, date: str | None, cpu: str | None) -> TemplateRequest:
    from offloadd.config.requests import checked
    from offloadd.model.template import TemplateRequest

    given = {"machine": machine, "date": date, "cpu": cpu}
    return checked(TemplateRequest, {name: value for name, value in given.items() if value is not None}, {})


def _words(template: dict[str, Any]) -> str:
    return f"{template['machine']} on {template['cpu']} with {format_size(template['memory_mib'] << 20)}"


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload template`."""
    commands.add_typer(app, name="template")
