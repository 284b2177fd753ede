"""`offload route`, and how a decision of the router looks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from textwrap import fill
from typing import Any

import typer

from offload_cli.complete import machine_names, prefer_names, system_names
from offload_cli.connection import open_client
from offload_cli.show import table
from offload_cli.target import DebianOptions, Target, find_target
from offload_cli.terminal import one_line, print_json, print_text, terminal_width
from offload_cli.words import json_option
from offloadd.errors import NoMachineError
from offloadd.model.asked import Asked, Changes
from offloadd.model.quantity import format_size


def route(
    system: str = typer.Argument(metavar="SYSTEM", autocompletion=system_names, help="x86_64-linux, arm64, i686-linux-gnu ..."),
    what: str | None = typer.Argument(None, metavar="[WHAT]", help="A directory, a Debian package, a .dsc, guix:NAME."),
    date: str | None = typer.Option(None, metavar="DATE", help="As for offload build."),
    cpu: str | None = typer.Option(None, metavar="MODEL", help="As for offload build."),
    kernel: str | None = typer.Option(None, metavar="VERSION", help="What the kernel's version must begin with."),
    machine: str | None = typer.Option(None, metavar="NAME", autocompletion=machine_names, help="Only this machine."),
    prefer: list[str] = typer.Option(
        [], metavar="NAME", autocompletion=prefer_names, help="A machine or kind to take first; repeatable."
    ),
    feature: list[str] = typer.Option([], metavar="LABEL", help="What the machine must offer; repeatable."),
    keep_machine: bool = typer.Option(False, "--keep-machine", help="As for offload build."),
    network: bool = typer.Option(False, "--network", help="The build needs the network."),
    as_json: bool = json_option(),
) -> None:
    """Show which machine a build would go to, and why no other.  Nothing is built.

    \b
    Examples:
      offload route aarch64-linux
      offload route x86_64-linux --date 2020-01-01
      offload route riscv64 --network --json
      offload route arm64 ./project
    """
    requirements: dict[str, Any] = {"features": tuple(feature), "network": network or None, "kernel": kernel}
    changes = Changes(requirements={name: value for name, value in requirements.items() if value})
    anything = Target(asked=Asked(recipe={"name": "any", "steps": ("true",)}, changes=changes))
    target = anything if what is None else find_target(what, changes, DebianOptions())
    options = {"date": date, "cpu": cpu, "machine": machine, "prefer": tuple(prefer), "keep-machine": keep_machine}
    with open_client() as client:
        [request] = target.requests(client, options=options, systems=(system,), systems_option="SYSTEM")
        decision = client.post("/v1/route", request)
    if as_json:
        print_json(decision)
    else:
        print_text(decision_table(decision, terminal_width()))
    if decision["machine"] is None:
        raise typer.Exit(NoMachineError.exit_status)


def source_line(source: Mapping[str, Any]) -> str:
    """What a source goes by."""
    ways = "to VMs as a disk, else in frames" if source["channel_to_vms"] == "disk" else "in frames"
    return f"source   {format_size(source['size'])}: {ways}"


def decision_table(decision: Mapping[str, Any], width: int | None = None) -> str:
    """The candidates, best first; those that were passed over, with the reasons; those for other system types, in one line.

    Below that what to do when nobody can.

    Args:
        width: of the terminal; None for as wide as it comes.
    """
    system, chosen, unrelated = decision["system"], decision["machine"], decision["unrelated"]
    rows = [
        [str(rank), candidate["machine"], candidate["kind"], candidate["why"]]
        for rank, candidate in enumerate(decision["candidates"], 1)
    ]
    passed_over = {name: why for name, why in decision["passed_over"].items() if name not in unrelated}
    rows += [["-", name, decision["kinds"][name], f"no: {why}"] for name, why in passed_over.items()]
    lines = [one_line(f"{system}: {chosen}" if chosen else f"{system}: no machine can do this build")]
    if rows:
        lines.append(table(["RANK", "MACHINE", "KIND", "WHY"], rows, width))
    if unrelated:
        lines.append(fill(f"not for {system}: {', '.join(unrelated)}", width or sys.maxsize, break_on_hyphens=False))
    if decision["hint"]:
        lines.append(one_line(f"hint: {decision['hint']}"))
    return "\n".join(lines)


def add_to(commands: typer.Typer) -> None:
    """Add `offload route`."""
    commands.command()(route)
