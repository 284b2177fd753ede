"""`offload vm`."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli import screen
from offload_cli.complete import vm_names
from offload_cli.connection import open_client, show_work
from offload_cli.show import machine_text, machines_table, short_path
from offload_cli.terminal import clean, print_json, print_text, say, terminal_width
from offload_cli.words import WithCommand, json_option, known_form, tail
from offloadd.errors import HostError, NotFoundError, UsageError
from offloadd.model.quantity import format_duration

if TYPE_CHECKING:
    from offloadd.client import Client

app = typer.Typer(help="The virtual machines.", no_args_is_help=True, rich_markup_mode=None)

_NAME = typer.Argument(metavar="NAME", callback=known_form, autocompletion=vm_names, help="The machine's name.")


@app.command("list")
def list_(as_json: bool = json_option()) -> None:
    """List the virtual machines.

    \b
    Example:
      offload vm list
    """
    with open_client() as client:
        rows = client.get("/v1/machines", vms=True)
    if as_json:
        print_json(rows)
    else:
        print_text(machines_table(rows, time.time(), terminal_width()) if rows else "No virtual machines are declared.")


@app.command()
def start(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Start a machine and wait until one can talk to it.

    \b
    Example:
      offload vm start build-vm
    """
    began = time.monotonic()
    with open_client() as client:
        try:
            machine = show_work(client, f"/v1/machines/{name}/start", "starting")
        except KeyboardInterrupt:
            _stop_start(client, name)
            raise
    if as_json:
        print_json(machine)
    else:
        port = f", SSH on 127.0.0.1:{machine['ssh_port']}" if machine.get("ssh_port") else ""
        say(f"{name} runs after {format_duration(time.monotonic() - began)}{port}: offload vm ssh {name}")


def _stop_start(client: Client, name: str) -> None:
    """The user does not want it any more."""
    with suppress(NotFoundError):  # it had not begun, or is over
        client.post(f"/v1/machines/{name}/stop")


@app.command()
def stop(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Stop a machine: politely, then less so.

    \b
    Example:
      offload vm stop build-vm
    """
    with open_client() as client:
        row = client.post(f"/v1/machines/{name}/stop")
    if as_json:
        print_json(row)
    else:
        say(f"{name}: {row['state']}" + (f" ({row['reason']})" if row.get("reason") else ""))


@app.command()
def show(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Show a machine: its state, its clock and CPU, and what it runs on.

    \b
    Example:
      offload vm show build-vm
    """
    machine = _machine(name)
    if as_json:
        print_json(machine)
    else:
        print_text(machine_text(machine))


def _machine(name: str) -> dict[str, Any]:
    with open_client() as client:
        machine: dict[str, Any] = client.get(f"/v1/machines/{name}")
    if "instance" not in machine:
        raise UsageError("is no virtual machine", subject=name, hint=f"offload machine show {name}")
    return machine


@app.command()
def configuration(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Print a machine's description as it was understood, with every default.

    \b
    Example:
      offload vm configuration build-vm > ~/.config/offload/machines/mine.yaml
    """
    from offloadd.config.document import dump_yaml

    values = {field: value for field, value in _machine(name)["configuration"].items() if value is not None}
    if as_json:
        print_json(values)
        return
    # JSON has no numbers as names.
    values["port-forwardings"] = {int(host): guest for host, guest in values.get("port-forwardings", {}).items()}
    print_text(dump_yaml(values))


@app.command()
def console(name: str = _NAME) -> None:
    """Connect to a machine's console; Ctrl-] leaves it.

    \b
    Example:
      offload vm console build-vm
    """
    from offload_cli.console import run_console

    machine = _running(name)
    run_console(Path(machine["console_socket"]), Path(machine["console_log"]))


@app.command(cls=WithCommand)
def ssh(ctx: typer.Context, name: str = _NAME) -> None:
    """Log in to a machine that runs.  What stands after `--` is given to OpenSSH as the command.

    \b
    Examples:
      offload vm ssh build-vm
      offload vm ssh build-vm -- uname -a
    """
    from offload_cli.ssh import run_ssh

    run_ssh(_running(name), tail(ctx))


@app.command("exec", cls=WithCommand)
def exec_(ctx: typer.Context, name: str = _NAME) -> None:
    """Run a command in a machine that runs: no terminal, each word as it is, and its exit status is ours.

    \b
    Example:
      offload vm exec build-vm -- date -u
    """
    from offload_cli.ssh import run_exec

    command = tail(ctx)
    if not command:
        raise UsageError("which command?", hint=f"offload vm exec {name} -- COMMAND...")
    run_exec(_running(name), command)


def _running(name: str) -> dict[str, Any]:
    machine = _machine(name)
    if not machine.get("instance"):
        raise NotFoundError("does not run", subject=name, hint=f"offload vm start {name}")
    return machine


@app.command()
def logs(
    name: str = _NAME,
    list_: bool = typer.Option(False, "--list", help="List the logs that are kept, the newest first."),
    as_json: bool = json_option(),
) -> None:
    """Print a machine's console log: of this run, else of the last one.

    \b
    Examples:
      offload vm logs build-vm
      offload vm logs build-vm --list
    """
    machine = _machine(name)
    kept = sorted(Path(machine["logs"]).glob("*/console.log"), reverse=True)
    live = [Path(machine["console_log"])] if machine.get("console_log") else []
    found = [path for path in (*live, *kept) if path.exists()]
    if as_json:
        print_json([{"path": str(path), "size": path.stat().st_size, "live": path in live} for path in found])
    elif list_:
        print_text("\n".join(short_path(path) for path in found) or "No logs are kept.")
    elif not found:
        raise NotFoundError("has no console log yet", subject=name, hint=f"offload vm start {name}")
    else:
        _print_log(found[0])


def _print_log(path: Path) -> None:
    try:
        text = path.read_bytes()
    except OSError as exc:
        raise HostError(f"cannot be read: {exc.strerror}", subject=str(path)) from exc
    if sys.stdout.isatty():
        print_text(clean(text.decode(errors="replace")).replace("\r", ""))
    else:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), text) if len(text) < 4096 else sys.stdout.buffer.write(text)


screen.add_to(app)


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload vm`."""
    commands.add_typer(app, name="vm")
