"""`offload doctor`."""

from __future__ import annotations

import typer

from offload_cli.words import json_option


def doctor(as_json: bool = json_option()) -> None:
    """Look at what offload needs from this host, and name the command that mends what is missing.

    \b
    Example:
      offload doctor
    """
    raise typer.Exit(70)
