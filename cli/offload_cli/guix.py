"""`offload guix`: what guix-daemon of this host needs to send builds to our machines."""

from __future__ import annotations

import typer

from offload_cli import guix_keys, guix_setup

app = typer.Typer(
    help="Let Guix send its builds to the machines: keys, access-control list.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(guix_keys.keys, name="keys")
app.add_typer(guix_keys.acl, name="acl")
app.command("setup")(guix_setup.guix)


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload guix`."""
    commands.add_typer(app, name="guix")
