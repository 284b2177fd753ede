"""`offload builds`, `offload log`, `offload cancel`."""

from __future__ import annotations

import json
import time

import typer

from offload_cli.complete import build_names
from offload_cli.connection import open_client
from offload_cli.show import build_summary, builds_table
from offload_cli.terminal import LogStream, print_json, print_text, say, terminal_width
from offload_cli.words import json_option, known_form

_BUILD = typer.Argument(
    metavar="BUILD", callback=known_form, autocompletion=build_names, help="Its id, as `offload builds` shows it."
)
_QUIET_S = 0.5
"""A log that says nothing for this long has been printed as far as it goes."""


def add_to(app: typer.Typer) -> None:
    """These are commands of `offload` itself."""
    for command in (builds, log, cancel):
        app.command()(command)


def builds(limit: int = typer.Option(20, min=1, max=1000, help="How many."), as_json: bool = json_option()) -> None:
    """List the builds, the newest first.

    \b
    Example:
      offload builds --limit 5
    """
    with open_client() as client:
        rows = client.get("/v1/builds", limit=limit)
    if as_json:
        print_json(rows)
    else:
        print_text(builds_table(rows, time.time(), terminal_width()) if rows else "No builds yet: offload build --help")


def log(
    build: str = _BUILD,
    follow: bool = typer.Option(False, "-f", "--follow", help="Go on until the build ends."),
    as_json: bool = typer.Option(False, "--json", help="Print all that happened in it, one JSON object a line, for programs."),
) -> None:
    """Print the log of a build.

    \b
    Examples:
      offload log 1a2b3c4d
      offload log --follow 1a2b3c4d
    """
    stream = LogStream()
    with open_client() as client:
        try:
            for event in client.stream("GET", f"/v1/builds/{build}/events", quiet_s=None if follow else _QUIET_S):
                if as_json:
                    print_text(json.dumps(event, ensure_ascii=False))
                elif event.get("event") == "log":
                    stream.write(str(event["text"]))
                    if stream.error:
                        raise stream.error
        finally:
            stream.end()


def cancel(
    build: str = _BUILD,
    as_json: bool = json_option(),
) -> None:
    """Cancel a build, and wait until nothing of it is left.

    One that has ended stays as it is.

    \b
    Example:
      offload cancel 1a2b3c4d
    """
    with open_client() as client:
        row = client.post(f"/v1/builds/{build}/cancel")
    if as_json:
        print_json(row)
    else:
        say(build_summary(str(row["state"]), row, None)[0])
