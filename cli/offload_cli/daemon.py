"""`offload daemon`."""

from __future__ import annotations

import os
import select

import typer

from offload_cli.show import fields, moment
from offload_cli.terminal import print_json, print_text, say
from offload_cli.words import json_option
from offloadd.errors import NotFoundError
from offloadd.model.quantity import format_duration

app = typer.Typer(help="The daemon that owns the machines.", no_args_is_help=True, rich_markup_mode=None)

_STOP_S = 60.0


@app.command()
def status(as_json: bool = json_option()) -> None:
    """Show the daemon.  None is started: exit status 5 when there is none.

    \b
    Example:
      offload daemon status
    """
    from offloadd.client import Client

    with Client() as client:
        if not client.answers():
            raise NotFoundError("not running", subject="offloadd", hint="the first command that needs it starts it")
        found = client.get("/v1/status")
    if as_json:
        print_json(found)
        return
    idle = found.get("idle_timeout_s")
    pairs = [
        ("version", str(found["version"])),
        ("process", f"{found['pid']}, since {moment(found['started'])}"),
        ("machines", str(found["machines"])),
        ("builds", str(found["builds"])),
        ("ends", f"after {format_duration(idle)} without work" if idle else "when told to"),
        ("socket", str(found["socket"])),
        ("state", str(found["state"])),
        ("cache", str(found["cache"])),
        ("log", str(found["log"])),
    ]
    print_text("\n".join(["offloadd is running", *fields(pairs)]))


@app.command()
def stop(as_json: bool = json_option()) -> None:
    """Stop the daemon, its builds and its machines, and wait for it.  Exit status 5 when there is none.

    \b
    Example:
      offload daemon stop
    """
    from offloadd.client import Client

    with Client() as client:
        if not client.answers():
            raise NotFoundError("not running", subject="offloadd")
        stopped = client.post("/v1/stop")
        ended = _wait_ended(int(stopped["pid"]))
    if as_json:
        print_json({**stopped, "ended": ended})
    else:
        say("offloadd has ended" if ended else f"offloadd ({stopped['pid']}) is still busy with ending its builds and machines")


def _wait_ended(pid: int) -> bool:
    """Whether the process ends within the limit.  It is no child of ours: there is nothing to wait on but its descriptor."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        ready, _, _ = select.select([descriptor], [], [], _STOP_S)
        return bool(ready)
    finally:
        os.close(descriptor)


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload daemon`."""
    commands.add_typer(app, name="daemon")
