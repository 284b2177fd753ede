"""`offload guix setup` and `offload nix setup`: their daemons use our machines from then on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.complete import machine_names
from offload_cli.connection import open_client
from offload_cli.terminal import print_json, print_text, say
from offload_cli.words import json_option, known_form
from offloadd.errors import NotFoundError

if TYPE_CHECKING:
    from offloadd.model.door import Door
    from offloadd.setup.guix import Guest
    from offloadd.setup.journal import Journal
    from offloadd.setup.steps import Step

_MACHINES = typer.Argument(
    None, metavar="MACHINE...", autocompletion=machine_names, help="By default all that take its builds."
)
_DRY_RUN = typer.Option(False, "--dry-run", help="Only say which files would be written.")
_UNDO = typer.Option(False, "--undo", help="Take back what was set up; what others have changed since is left alone.")


def guix(
    machines: list[str] = _MACHINES,
    dry_run: bool = _DRY_RUN,
    undo: bool = _UNDO,
    directory: Path | None = typer.Option(
        None, "--directory", metavar="DIR", help="Guix's configuration; else $GUIX_CONFIGURATION_DIRECTORY, else /etc/guix."
    ),
    socket_directory: Path | None = typer.Option(
        None,
        "--socket-directory",
        metavar="DIR",
        help="Where a guix-daemon with a user of its own finds our daemon; else /run/offload-build-daemons.",
    ),
    as_json: bool = json_option(),
) -> None:
    """Let guix-daemon of this host send builds to the machines (`daemons: [guix]` in their files).

    Host and machines get signing keys, and trust each other's; machines.scm includes ours, and keeps what is in it.
    Each file that is written is printed; --undo takes back exactly these.

    \b
    Examples:
      sudo offload guix setup --dry-run
      sudo offload guix setup guix-vm
      sudo offload guix setup --undo
    """
    from offloadd.guix.files import configuration_directory

    default = configuration_directory()
    folder = directory.absolute() if directory else default
    journal = _journal("guix", folder)
    if undo:
        gone = _undo(journal, machines or (), dry_run=dry_run, as_json=as_json)
        if not dry_run:
            _refresh_doors()
        _tell_of_restart("guix", gone, folder / "offload/hook")
        return
    guests, door = _guests(machines or ()), _find_door(folder, socket_directory)
    _set_up(_guix_steps(folder, guests, door), journal, dry_run=dry_run, as_json=as_json)
    if not dry_run:
        _refresh_doors()
    for guest in guests:
        if guest.secret_root is None:
            say(f"{guest.machine}: not ours: give it {folder}/signing-key.pub, and this host its key (acl authorize)")
    _tell_of_daemon(folder, door)


def _tell_of_daemon(folder: Path, door: Door | None) -> None:
    """What is left to be done."""
    from offloadd.guix.files import owner_for

    hook = f"GUIX={folder}/offload/hook"
    if drop_in := _drop_in(folder):
        say(f"guix-daemon gets {hook} from {drop_in}: systemctl daemon-reload && systemctl restart guix-daemon")
    else:
        say(f"guix-daemon needs {hook} in its environment, and a restart")
    say("machines that run take their new keys when they are started anew")
    _tell_of_service()
    owner = owner_for(folder)
    if door is not None:
        say(f"guix-daemon runs as user {door.uid}, who may ask our daemon for machines: {door.socket}")
    elif owner and owner.uid not in (0, os.geteuid()):
        # The socket is ours alone: whoever may use it has all that the daemon can do.
        say(f"guix-daemon runs as user {owner.uid}, who cannot reach our daemon: it offloads as without us; root can")


def _drop_in(folder: Path) -> Path | None:
    """Where systemd is told of the hook, when it has a guix-daemon that looks into this directory."""
    from offloadd.setup.guix import DROP_IN, has_unit

    return DROP_IN if folder == Path("/etc/guix") and has_unit() else None


def _tell_of_restart(which: str, gone: Sequence[Path], hook: Path) -> None:
    """What is left to be done after an undo: a daemon that runs goes on with the hook that it was started with."""
    from offloadd.setup.guix import DROP_IN

    if DROP_IN in gone:
        say(f"{which}-daemon still has GUIX={hook}: systemctl daemon-reload && systemctl restart {which}-daemon")
    elif hook in gone:
        say(f"restart {which}-daemon, if one runs: until then it looks for {hook}, which is gone")
        if which == "guix":
            say("and take GUIX out of its environment, if you have put it there")


def _tell_of_service() -> None:
    say("machines are started on demand while offloadd runs: have it as a service; one that a command starts ends when idle")


def nix(
    machines: list[str] = _MACHINES,
    dry_run: bool = _DRY_RUN,
    undo: bool = _UNDO,
    directory: Path | None = typer.Option(
        None, "--directory", metavar="DIR", help="Where nix.conf is; else $NIX_CONF_DIR, else /etc/nix."
    ),
    as_json: bool = json_option(),
) -> None:
    """Let nix-daemon of this host send builds to the machines (`daemons: [nix]` in their files).

    Its build hook is ours from then on; it asks Nix's own one where none of the machines takes a build.
    Each file that is written is printed; --undo takes back exactly these.

    \b
    Examples:
      sudo offload nix setup --dry-run
      sudo offload nix setup
      sudo offload nix setup --undo
    """
    from offloadd.paths import find_paths
    from offloadd.setup.nix import nix_directory, nix_steps
    from offloadd.setup.wrapper import real_program

    folder = directory.absolute() if directory else nix_directory()
    journal = _journal("nix", folder)
    if undo:
        # There is nothing of a machine's.
        gone = _undo(journal, (), dry_run=dry_run, as_json=as_json)
        _tell_of_restart("nix", gone, folder / "offload/hook")
        return
    _offers("nix", machines or ())
    instead = [real_program("nix", folder / "offload/hook"), "__build-remote"]
    hook = _wrapper("nix-hook", find_paths().socket, instead)
    _set_up(nix_steps(folder, hook), journal, dry_run=dry_run, as_json=as_json)
    say("restart nix-daemon, if one runs: until then it has the hook that it was started with")
    _tell_of_service()


def _journal(which: str, directory: Path) -> Journal:
    from offloadd.paths import find_paths
    from offloadd.setup.journal import Journal, setup_name

    return Journal(find_paths().state / "setup" / f"{setup_name(which, directory)}.json")


def _offers(daemon: str, machines: Sequence[str]) -> list[dict[str, Any]]:
    """What is offered to that daemon, of these machines alone if there are some; their keys are there from then on."""
    with open_client() as client:
        offers: list[dict[str, Any]] = client.get("/v1/offers", daemon=daemon)
    known = {offer["machine"] for offer in offers}
    for name in machines:
        if known_form(name) not in known:
            hint = f"offload machine show {name}: does it have `daemons: [{daemon}]`, and is it online?"
            raise NotFoundError(f"takes no builds of {daemon.capitalize()}", subject=name, hint=hint)
    if not offers:
        raise NotFoundError(
            f"no machine takes builds of {daemon.capitalize()}", hint=f"`daemons: [{daemon}]` in a machine's file"
        )
    return [offer for offer in offers if not machines or offer["machine"] in machines]


def _guests(machines: Sequence[str]) -> list[Guest]:
    from offloadd.setup.guix import Guest

    guests = []
    offers = _offers("guix", machines)
    with open_client() as client:
        for offer in offers:
            about = client.get(f"/v1/machines/{offer['machine']}")
            key = Path(offer["private-key"])
            # By default the two are neighbours.
            root = None if about["kind"] == "ssh" else Path(about.get("secret_root") or key.with_name("root"))
            guests.append(Guest(machine=offer["machine"], client_key=key, secret_root=root))
    return guests


def _find_door(folder: Path, chosen: Path | None) -> Door | None:
    """Our daemon's second socket, where guix-daemon needs one."""
    from offloadd.guix.files import owner_for
    from offloadd.setup.door import DOORS, guix_door, needs_door

    owner = owner_for(folder)
    if owner is None or not needs_door(owner):
        return None
    # What is a link today may be another one tomorrow.
    return guix_door(folder, owner, (chosen or DOORS).resolve())


def _refresh_doors() -> None:
    """A daemon that runs opens and closes them at once, the next one when it starts."""
    from offloadd.client import Client

    with Client() as client:
        if client.answers():
            client.post("/v1/doors")


def _guix_steps(folder: Path, guests: Sequence[Guest], door: Door | None) -> list[Step]:
    from offloadd.guix.files import owner_for
    from offloadd.guix.live import render_live
    from offloadd.paths import find_paths
    from offloadd.setup.guix import GuixHost, guix_steps
    from offloadd.setup.wrapper import real_program

    paths = find_paths()
    socket = door.socket if door else paths.socket
    live = render_live(socket, os.geteuid(), folder / "offload/ssh")
    hook = _wrapper("guix-hook", socket, [real_program("guix", folder / "offload/hook")])
    host = GuixHost(directory=folder, owner=owner_for(folder), live=live, hook=hook)
    steps = guix_steps(host, guests, drop_in=_drop_in(folder))
    if door is None:
        return steps
    from offloadd.setup.door import door_record, door_step

    return [door_step(door_record(paths, folder), door), *steps]


def _wrapper(command: str, socket: Path, instead: Sequence[str]) -> bytes:
    """What runs our hook, which asks the daemon that listens there; `instead` where that cannot be run."""
    import offload_cli.entry
    import offloadd
    from offloadd.setup.wrapper import hook_program, wrapper

    program = hook_program(command, sys.executable, Path(offload_cli.entry.__file__), Path(offloadd.__path__[0]))
    # The build daemon's user may be another one than ours.
    environment = {"OFFLOAD_SOCKET": str(socket), "OFFLOAD_SOCKET_OWNER": str(os.geteuid())}
    return wrapper(program, environment, instead)


def _set_up(steps: Sequence[Step], journal: Journal, *, dry_run: bool, as_json: bool) -> None:
    from offloadd.setup.steps import perform

    if dry_run:
        _print([path for step in steps for path in step.wanted()], as_json=as_json)
        return
    done = []
    for path in perform(steps, journal):
        done.append(path)
        if not as_json:
            print_text(str(path))
    if as_json:
        print_json([str(path) for path in done])
    elif not done:
        say("nothing to do: it is set up")


def _print(paths: Sequence[Path], *, as_json: bool) -> None:
    if as_json:
        print_json([str(path) for path in paths])
    elif paths:
        print_text("\n".join(map(str, paths)))
    else:
        say("nothing to do")


def _undo(journal: Journal, machines: Sequence[str], *, dry_run: bool, as_json: bool) -> list[Path]:
    """The files that are gone from then on."""
    if dry_run:
        _print(journal.paths(machines), as_json=as_json)
        return []
    done = []
    for undone in journal.undo(machines):
        done.append(undone)
        if not as_json:
            print_text(f"{undone.path}: {undone.verdict}")
    if as_json:
        print_json([{"path": str(undone.path), "verdict": undone.verdict} for undone in done])
    elif not done:
        say("nothing to undo")
    return [undone.path for undone in done if undone.verdict in ("removed", "was gone already")]
