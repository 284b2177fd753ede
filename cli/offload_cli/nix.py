"""`offload nix`: what nix-daemon of this host needs to send builds to our machines."""

from __future__ import annotations

import typer

from offload_cli import guix_setup

app = typer.Typer(help="Let Nix send its builds to the machines.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Let Nix send its builds to the machines."""


app.command("setup")(guix_setup.nix)


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload nix`."""
    commands.add_typer(app, name="nix")
