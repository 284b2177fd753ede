"""`offload machine export`: our machines in the lists of Guix and Nix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from offload_cli.complete import machine_names
from offload_cli.connection import open_client
from offload_cli.terminal import print_text, say
from offloadd.errors import HostError, NotAllowedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from offloadd.model.offer import Offer

MARK = "Made by offload"
"""In the first line of what we write: such a file may be written anew."""


class Format(StrEnum):
    GUIX = "guix"
    NIX = "nix"


class NixScheme(StrEnum):
    SSH_NG = "ssh-ng"
    SSH = "ssh"


def export(
    names: list[str] = typer.Argument(None, metavar="NAME...", autocompletion=machine_names, help="By default all."),
    form: Format = typer.Option(..., "--format", help="Whose list."),
    running: bool = typer.Option(False, "--running/--all", help="Only machines that run now, or all that take its builds."),
    live: bool = typer.Option(False, "--live", help="For Guix: a file that has, each time it is read, those that run then."),
    scheme: NixScheme = typer.Option(NixScheme.SSH_NG, "--scheme", help="For Nix: how it talks to machines."),
    ssh_config: bool = typer.Option(
        False, "--ssh-config", help="For old Nix (2.8), which takes no port: a part of ssh_config, and the list with its names."
    ),
    output: Path | None = typer.Option(None, "--output", "-o", metavar="FILE", help="Write it there."),
) -> None:
    """Print the machines that take builds of Guix or Nix (`daemons` in their files), as these have them in their own lists.

    A file that is not ours is never overwritten.  `offload guix setup` and `offload nix setup` do all of it by themselves.

    \b
    Examples:
      offload machine export --format guix --running
      offload machine export --format guix --live -o /etc/guix/offload/machines.scm
      offload machine export --format nix -o /etc/nix/offload.machines
    """
    _check(form, names, running=running, live=live, ssh_config=ssh_config, scheme=scheme)
    text = _live() if live else _render(_offers(form, names or (), running=running), form, scheme, ssh_config=ssh_config)
    if output is None:
        print_text(text.rstrip("\n"))
    else:
        write_ours(output, text)
        say(f"written: {output}")


def _check(
    form: Format, names: Sequence[str] | None, *, running: bool, live: bool, ssh_config: bool, scheme: NixScheme
) -> None:
    if live and form is not Format.GUIX:
        raise UsageError("--live: Nix's list is no program", hint="offload nix setup")
    if live and (names or running):
        raise UsageError("--live: such a file has what runs when it is read", hint="leave out names and --running")
    if ssh_config and form is not Format.NIX:
        raise UsageError("--ssh-config is for Nix; Guix takes a port")
    if scheme is not NixScheme.SSH_NG and form is not Format.NIX:
        raise UsageError("--scheme is for Nix")


def _offers(form: Format, names: Sequence[str], *, running: bool) -> list[Offer]:
    """What the daemon offers, those of these names alone unless there are none."""
    from offloadd.model.offer import Offer

    with open_client() as client:
        offers = [Offer.model_validate(row, strict=False) for row in client.get("/v1/offers", daemon=form.value)]
    known = {offer.machine for offer in offers}
    for name in names:
        if name not in known:
            hint = f"offload machine show {name}: does it have `daemons: [{form.value}]`, and is it online?"
            raise NotFoundError(f"takes no builds of {form.name.capitalize()}", subject=name, hint=hint)
    offers = [offer for offer in offers if not names or offer.machine in names]
    away = [offer.machine for offer in offers if offer.state != "running"]
    if running:
        return [offer for offer in offers if offer.state == "running"]
    if form is Format.GUIX and away:
        say(f"not running: {', '.join(away)}; Guix waits for a machine that does not answer: --running, --live")
    return offers


def _render(offers: Sequence[Offer], form: Format, scheme: NixScheme, *, ssh_config: bool) -> str:
    from offloadd.guix.machines import render_guix
    from offloadd.nix.machines import nix_line, render_ssh_config

    try:
        if form is Format.GUIX:
            return render_guix(offers)
        if not ssh_config:
            return "".join(f"{line}\n" for line in [f"# {MARK}", *(nix_line(offer, scheme.value) for offer in offers)])
        head = f"# {MARK}; with it, these lines are the list of machines:\n"
        lines = "".join(f"#   {nix_line(offer, scheme.value, alias=alias(offer))}\n" for offer in offers)
        return "\n".join([head + lines, *(render_ssh_config(offer, alias(offer)) for offer in offers)])
    except ValueError as exc:
        raise UsageError(f"cannot be written: {exc}") from exc


def alias(offer: Offer) -> str:
    """The machine's name in ssh_config, which has other hosts too."""
    return f"offload-{offer.machine}"


def _live() -> str:
    from offloadd.guix.files import configuration_directory
    from offloadd.guix.live import render_live
    from offloadd.paths import find_paths
    from offloadd.setup.door import guix_socket

    configuration = configuration_directory()
    return render_live(guix_socket(find_paths(), configuration), os.geteuid(), configuration / "offload/ssh")


def write_ours(path: Path, text: str) -> None:
    """Write a file that everybody may read, complete or not at all.

    Raises:
        NotAllowedError: there is one that was not made here, or a symbolic link.
        HostError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_symlink():
            raise NotAllowedError("is a symbolic link: what it points to is not ours", subject=str(path))
        if path.exists() and MARK not in path.read_text(errors="replace").split("\n", 1)[0]:
            raise NotAllowedError("is not ours to overwrite", subject=str(path), hint="write it elsewhere and include it")
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "w") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(text)
            new.replace(path)
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)
    except OSError as exc:
        raise HostError(f"cannot be written: {exc.strerror}", subject=str(path)) from exc
