"""`offload env`: the root file systems that builds run in."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.complete import environment_names, system_names
from offload_cli.connection import open_client, show_work
from offload_cli.show import environments_table
from offload_cli.target import DebianOptions, find_target
from offload_cli.terminal import print_json, print_text, say, terminal_width
from offload_cli.words import WithCommand, json_option, tail
from offloadd.errors import HostError, NotFoundError, UsageError
from offloadd.model.asked import Changes
from offloadd.model.quantity import format_duration, format_size

if TYPE_CHECKING:
    from offloadd.model.environment import EnvironmentRequest

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_DIGEST = re.compile(r"[0-9a-f]{4,64}")
_NAMES = {"packages": "--package", "suite": "the suite", "digest": "the digest"}

_SYSTEM = typer.Option(
    None, "-s", "--system", metavar="SYSTEM", autocompletion=system_names, help="The system type; by default this host's."
)
_ARCH = typer.Option(None, "-a", "--arch", metavar="ARCH", help="The same in Debian's words: arm64.")
_PACKAGES = typer.Option([], "-p", "--package", metavar="PKG", help="A Debian package that is to be in it; repeatable.")
_BY_DIGEST = typer.Argument(
    metavar="DIGEST", autocompletion=environment_names, help="The environment's digest, or the beginning of it."
)


@app.callback()
def _group() -> None:
    """The root file systems that builds run in.

    Each is a Debian suite, an architecture and packages, and is kept by its digest.  Builds make those that they need
    by themselves.
    """


@app.command("list")
def list_(as_json: bool = json_option()) -> None:
    """List the environments that were made.

    \b
    Example:
      offload env list
    """
    with open_client() as client:
        rows = client.get("/v1/environments")
    if as_json:
        print_json(rows)
    else:
        none = "No environments yet: a build makes the one that it needs."
        print_text(environments_table(rows, time.time(), terminal_width()) if rows else none)


@app.command()
def build(
    what: str = typer.Argument(metavar="SUITE|DIR", help="A Debian suite, or a directory with an offload.yaml."),
    system: str | None = _SYSTEM,
    arch: str | None = _ARCH,
    package: list[str] = _PACKAGES,
    rebuild: bool = typer.Option(False, "--rebuild", help="Make it again, although it is there: with today's packages."),
    as_json: bool = json_option(),
) -> None:
    """Make an environment, unless it is there: then it is checked.

    \b
    Examples:
      offload env build bookworm -p gcc -p make
      offload env build bookworm -s aarch64-linux
      offload env build ./project
    """
    request = _find_request(what, system, arch, package)
    began = time.monotonic()
    with open_client() as client:
        query = "?rebuild=true" if rebuild else ""
        found = show_work(client, f"/v1/environments/build{query}", f"environment {what}", request.to_json())
    if as_json:
        print_json(found)
        return
    took = format_duration(time.monotonic() - began)
    say(f"environment {found['digest'][:12]} is ready: {_words(found)}, {format_size(found['size'])}, after {took}")


@app.command(cls=WithCommand)
def enter(
    ctx: typer.Context,
    what: str = typer.Argument(
        metavar="DIGEST|DIR|SUITE", autocompletion=environment_names, help="The beginning of a digest, or as for `build`."
    ),
    system: str | None = _SYSTEM,
    arch: str | None = _ARCH,
    package: list[str] = _PACKAGES,
    root: bool = typer.Option(False, "--root", help="Be root in there, and not the user whom builds run as."),
    network: bool = typer.Option(False, "--network", help="Have this host's network."),
) -> None:
    """Open a shell on this host in an environment, or run a command; what is changed there is thrown away.

    It sees what a build would see, as the same user.  The exit status is the command's.

    \b
    Examples:
      offload env enter bookworm -p gdb
      offload env enter ./project -- make check
      offload env enter 3cf5f84d --root --network -- apt-get update
    """
    request = _find_request(what, system, arch, package)
    with open_client() as client:
        found = show_work(client, "/v1/environments/unpack", f"environment {what}", request.to_json())
    raise typer.Exit(_enter(found, tail(ctx), as_root=root, network=network))


@app.command()
def rm(digest: str = _BY_DIGEST, as_json: bool = json_option()) -> None:
    """Remove an environment; a build that needs it makes it again.

    \b
    Example:
      offload env rm 3cf5f84d
    """
    if not re.fullmatch(r"[0-9a-f]{1,64}", digest):
        raise NotFoundError("there is no such environment", subject=repr(digest), hint="offload env list")
    with open_client() as client:
        gone = client.delete(f"/v1/environments/{digest}")
    if as_json:
        print_json(gone)
    else:
        say(f"removed {gone['digest'][:12]}: {_words(gone)}")


@app.command()
def gc(as_json: bool = json_option()) -> None:
    """Remove the environments that nobody has made or built in for a month.

    \b
    Example:
      offload env gc
    """
    with open_client() as client:
        gone = client.post("/v1/environments/gc")
    if as_json:
        print_json(gone)
    else:
        say(f"removed {len(gone)} environment{'s' if len(gone) != 1 else ''}")


def _words(environment: dict[str, Any]) -> str:
    recipe = environment["recipe"]
    count = len(recipe["packages"])
    more = f" with {count} package{'s' if count != 1 else ''}" if count else ""
    return f"{recipe['suite']} {recipe['architecture']}{more}"


def _find_request(what: str, system: str | None, arch: str | None, packages: Sequence[str]) -> EnvironmentRequest:
    """What `what` means: the beginning of a digest, a directory with a recipe, a suite.

    Raises:
        NotFoundError, ConfigError, UsageError: it is none of these, or something about it is wrong.
    """
    from offloadd.config.requests import known_system

    if system and arch:
        raise UsageError("--system and --arch say the same thing", hint="give one of them")
    named = (system, "--system") if system else (arch, "--arch")
    path, wanted = Path(what), known_system(named[0], named[1]) if named[0] else None
    if path.is_dir():
        return _request_of(path, wanted, packages)
    if "/" in what:
        raise NotFoundError("no such directory", subject=what)
    if _DIGEST.fullmatch(what) and not wanted and not packages:
        return _checked({"digest": what})
    return _checked({"suite": what, "system": wanted, "packages": tuple(packages)})


def _request_of(directory: Path, system: str | None, packages: Sequence[str]) -> EnvironmentRequest:
    from offloadd.config.requests import find_recipe

    changes = Changes(packages=tuple(packages))
    asked = find_target(str(directory.resolve()), changes, DebianOptions()).asked
    recipe = find_recipe(asked.file, asked.recipe, asked.changes)
    # As a build without a system type: this host's own when the recipe allows it.
    wanted = system or _first_allowed(recipe.systems)
    return _checked({"suite": recipe.suite, "system": wanted, "packages": recipe.packages})


def _first_allowed(systems: Sequence[str]) -> str | None:
    from offloadd.host import native_systems

    return None if not systems or set(systems) & set(native_systems()[:1]) else systems[0]


def _checked(values: dict[str, Any]) -> EnvironmentRequest:
    from offloadd.config.requests import checked
    from offloadd.model.environment import EnvironmentRequest

    return checked(EnvironmentRequest, {name: value for name, value in values.items() if value is not None}, _NAMES)


def _enter(found: dict[str, Any], command: Sequence[str], *, as_root: bool, network: bool) -> int:
    """Run the command, or a shell, in an environment that is unpacked here; its exit status."""
    from offload_cli.shell import run_shell
    from offloadd.environment.root import RootStore
    from offloadd.paths import find_paths
    from offloadd.place.enter import enter_command

    paths, digest = find_paths(), found["digest"]
    with RootStore(paths.cache / "roots").hold(digest) as root:
        if root is None:
            raise HostError("was removed in the meantime", subject=f"environment {digest[:12]}", hint="try again")
        state = paths.state / "work"
        with enter_command(root, state, system=found["system"], command=command, as_root=as_root, network=network) as argv:
            return run_shell(argv)


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload env`."""
    commands.add_typer(app, name="env")
