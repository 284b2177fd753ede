"""`offload machine import`: build machines of Guix and Nix become ours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.export import Format
from offload_cli.terminal import print_json, print_text, say
from offload_cli.words import json_option
from offloadd.errors import ConfigError, HostError, NotFoundError, Problem

if TYPE_CHECKING:
    from offloadd.model.found_offer import FoundOffer
    from offloadd.model.machine import Machine, SshMachine

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def import_(
    file: Path = typer.Argument(metavar="FILE", help="machines.scm, or a list of Nix's such as /etc/nix/machines."),
    form: Format | None = typer.Option(None, "--format", help="By default guix when its name ends in .scm, else nix."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only print the machines' files."),
    as_json: bool = json_option(),
) -> None:
    """Declare the build machines of a list of Guix's or Nix's as machines of kind ssh, each in a file of its own.

    The list is read and never run: a machines.scm that is a program is refused, with line and column.  Machines that are
    declared already, by host, port and user, are left out.

    \b
    Example:
      offload machine import /etc/guix/machines.scm --dry-run
    """
    from offloadd.config.document import dump_yaml
    from offloadd.config.library import load_library
    from offloadd.paths import find_paths

    paths = find_paths()
    known = load_library(paths.library).machines
    chosen = form or (Format.GUIX if file.suffix == ".scm" else Format.NIX)
    machines = _machines(_read(file, chosen, known), str(file))
    new = [machine for machine in machines if not _declared(machine, known.values())]
    for machine in machines:
        if machine not in new:
            say(f"{machine.user}@{machine.host}:{machine.port}: is declared already")
    values = {machine.name: _values(machine) for machine in new}
    if not dry_run:
        for name, fields in values.items():
            path = paths.config / "machines" / f"{name}.yaml"
            _write_new(path, dump_yaml(fields))
            say(f"written: {path}")
    if as_json:
        print_json(list(values.values()))
    elif dry_run:
        print_text("---\n".join(dump_yaml(fields) for fields in values.values()).rstrip())


def _read(file: Path, form: Format, taken: Mapping[str, Any]) -> list[FoundOffer]:
    from offloadd.guix.read import read_guix
    from offloadd.nix.read import read_nix

    names = frozenset(taken)
    if form is Format.NIX:
        return read_nix(file, names)
    try:
        return read_guix(file.read_text(), str(file), names)
    except OSError as exc:
        raise NotFoundError(f"cannot be read: {exc.strerror}", subject=str(file)) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError([Problem(file=str(file), line=0, field="", message="is not UTF-8")]) from exc


def _machines(found: Iterable[FoundOffer], file: str) -> list[SshMachine]:
    """The machines, checked as their own files would be."""
    from pydantic import ValidationError

    from offloadd.model.machine import SshMachine

    machines: list[SshMachine] = []
    problems = []
    for line, offer in found:
        fields = offer.model_dump(exclude={"machine", "state"})
        try:
            machine = SshMachine.model_validate({"kind": "ssh", "name": offer.machine, **fields}, by_name=True)
        except ValidationError as exc:
            for error in exc.errors(include_url=False):
                field, message = str(error["loc"][0]), f"{error['msg'].removeprefix('Value error, ')}, not {error['input']!r}"
                problems.append(Problem(file=file, line=line, field=field.replace("_", "-"), message=message))
        else:
            machines.append(machine)
    if problems:
        raise ConfigError(problems)
    return machines


def _declared(machine: SshMachine, known: Iterable[Machine]) -> bool:
    from offloadd.model.machine import SshMachine, VmMachine

    for other in known:
        if isinstance(other, SshMachine) and (other.host, other.port, other.user) == (machine.host, machine.port, machine.user):
            return True
        if isinstance(other, VmMachine) and machine.host in _LOOPBACK and other.ssh_forward == machine.port:
            return True
    return False


def _values(machine: SshMachine) -> dict[str, Any]:
    """What its file says: what is not as by default."""
    values: dict[str, Any] = machine.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {"kind": machine.kind, "name": machine.name, **values}


def _write_new(path: Path, text: str) -> None:
    """Raises: HostError: it cannot be written, or there is one already."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
            file.write(text)
    except OSError as exc:
        raise HostError(f"cannot be written: {exc.strerror}", subject=str(path)) from exc
