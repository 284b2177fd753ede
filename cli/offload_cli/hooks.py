"""`offload guix-hook` and `offload nix-hook` as `--help` shows them; `entry` runs them without loading the command line."""

from __future__ import annotations

import typer

from offloadd.errors import UsageError

_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}


def guix_hook(ctx: typer.Context) -> None:
    """For guix-daemon: start machines when builds need them.

    Set GUIX in guix-daemon's environment to a program that runs `offload guix-hook "$@"`; `offload guix setup` makes one.
    A build that a machine with `daemons: [guix]` can do goes there, and the machine is started when it does not run.
    Everything else is done by the real guix: OFFLOAD_GUIX says which one that is, OFFLOAD_SOCKET where our daemon
    listens, OFFLOAD_SOCKET_OWNER the number of the user that it runs as, when that is neither root nor ours.
    """
    raise UsageError("is started by guix-daemon", subject="guix-hook", hint="offload guix-hook --help")


def nix_hook(ctx: typer.Context) -> None:
    """For nix-daemon: start machines when builds need them.

    In nix.conf: `build-hook = /path/to/offload nix-hook`.
    A build that a machine with `daemons: [nix]` can do goes there, and the machine is started when it does not run.
    Everything else is done by `nix __build-remote`: OFFLOAD_NIX says of which nix.  OFFLOAD_SOCKET and OFFLOAD_SOCKET_OWNER
    are as for `guix-hook`.
    """
    raise UsageError("is started by Nix", subject="nix-hook", hint="offload nix-hook --help")


def add_to(app: typer.Typer) -> None:
    """Add both to the command line."""
    app.command("guix-hook", context_settings=_SETTINGS)(guix_hook)
    app.command("nix-hook", context_settings=_SETTINGS)(nix_hook)
