"""The entry point of `offload`: all commands, and how errors end them."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from offload_cli import (
    binfmt,
    builds,
    daemon,
    doctor,
    environments,
    guix,
    hooks,
    images,
    machine,
    nix,
    quirks,
    secrets,
    templates,
    vm,
)
from offload_cli.build import build
from offload_cli.route import route
from offload_cli.terminal import say, say_error
from offload_cli.words import EXIT_STATUSES, WithCommand
from offloadd import __version__
from offloadd.errors import OffloadError

INTERRUPTED = 130


class _Commands(TyperGroup):
    """All commands.  An error of ours is a message and an exit status, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OffloadError as exc:
            say_error(exc)
            raise typer.Exit(exc.exit_status) from exc
        except KeyboardInterrupt as exc:
            # Also SIGTERM and SIGHUP: then the terminal may be gone.
            with suppress(OSError):
                say("interrupted")
            raise typer.Exit(INTERRUPTED) from exc
        except BrokenPipeError as exc:
            # Whoever read our output (`| head`) has enough; Python would complain once more when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + signal.SIGPIPE) from exc


app = typer.Typer(
    cls=_Commands,
    name="offload",
    epilog=EXIT_STATUSES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=WithCommand)(build)
app.command()(route)
builds.add_to(app)
app.add_typer(images.app, name="image")
app.add_typer(environments.app, name="env")
app.add_typer(templates.app, name="template")
app.add_typer(machine.app, name="machine")
app.add_typer(vm.app, name="vm")
app.add_typer(secrets.app, name="secrets")
app.add_typer(binfmt.app, name="binfmt")
app.add_typer(guix.app, name="guix")
app.add_typer(nix.app, name="nix")
hooks.add_to(app)
app.add_typer(quirks.app, name="quirks")
app.add_typer(daemon.app, name="daemon")
app.command()(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offload {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit."),
) -> None:
    """Send a build to the machine that it needs: of another architecture, date or CPU; and bring the result back.

    That machine is this host, qemu-user, a virtual machine or a remote host; `offload route` says which, and why.

    \b
    Examples:
      offload build -s aarch64-linux hello
      offload build --date 2020-06-01 ./project
      offload build -p gcc -p make ./project -- make check
      offload doctor
    """


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point.

    A command of 0.2 s feels each hundredth: pydantic is not to look for plugins among all that is installed, and the process
    ends without taking its modules apart.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # `nohup` has SIGHUP ignored, and means it.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    status = 0
    try:
        app(prog_name="offload")
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
