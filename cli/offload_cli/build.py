"""`offload build`: send a directory, follow the build, bring the result back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.complete import machine_names
from offload_cli.connection import open_client
from offload_cli.follow import Ended, follow
from offload_cli.phases import Phases, open_phases
from offload_cli.request import Changes, check_directory, find_recipe, make_request
from offload_cli.result import DEFAULT, FAILED, check_out, default_out, keep_result
from offload_cli.show import build_summary
from offload_cli.terminal import LogStream, print_json, say, say_error
from offload_cli.words import json_option, tail
from offloadd.errors import OffloadError, error_from_json
from offloadd.model.quantity import format_size

if TYPE_CHECKING:
    from offloadd.client import Client
    from offloadd.model.recipe import BuildRequest

_TELL_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class _Order:
    """One build as it was asked for, checked."""

    source: Path
    request: BuildRequest
    out: Path
    exclude: tuple[Path, ...]


def build(
    ctx: typer.Context,
    directory: Path = typer.Argument(
        Path(), metavar="[DIR]", show_default=False, help="The source; by default the current directory."
    ),
    date: str | None = typer.Option(None, metavar="DATE", help="The clock at the first step: 2020-01-01, now, @SECONDS."),
    cpu: str | None = typer.Option(None, metavar="MODEL", help="The CPU model, in QEMU's words; by default one of that time."),
    machine: str | None = typer.Option(
        None, metavar="NAME", autocompletion=machine_names, help="The machine; by default the first that can."
    ),
    out: Path | None = typer.Option(
        None, "-o", "--out", metavar="OUT", help="Where the result goes; by default offload-out/NAME-VERSION."
    ),
    timeout: str | None = typer.Option(None, metavar="TIME", help="End the build after this time: 90, 10m, 2h."),
    max_silent_time: str | None = typer.Option(None, metavar="TIME", help="End the build when it is silent for this long."),
    keep_failed: bool = typer.Option(False, "--keep-failed", help="Bring a failed build's directory back, to OUT/failed."),
    package: list[str] = typer.Option([], "-p", "--package", metavar="PKG", help="A Debian package that it needs; repeatable."),
    output: list[str] = typer.Option([], "--output", metavar="PATTERN", help="What to bring back; repeatable."),
    as_json: bool = json_option(),
) -> None:
    """Build a directory in a machine, and bring the result back.

    DIR holds an offload.yaml, or the command to run is given after `--` (in place of the steps of that file).
    The build's log goes to standard output.

    \b
    Examples:
      offload build --date 2020-06-01 examples/time-trap
      offload build -p gcc -p make --output hello -o result ./hello -- make hello
    """
    options = {
        "date": date,
        "cpu": cpu,
        "machine": machine,
        "timeout": timeout,
        "max-silent-time": max_silent_time,
        "keep-failed": keep_failed,
    }
    try:
        changes = Changes(command=tail(ctx), packages=tuple(package), outputs=tuple(output))
        order = _order(directory, changes, options, out)
        status = _run(order, as_json=as_json)
    except OffloadError as exc:
        if as_json:
            print_json({"state": "errored", "error": exc.to_json()})
        raise
    raise typer.Exit(status)


def _order(directory: Path, changes: Changes, options: dict[str, Any], out: Path | None) -> _Order:
    source = check_directory(directory)
    recipe = find_recipe(source, changes)
    request = make_request(recipe, options)
    target = check_out(out or default_out(f"{recipe.name}-{recipe.version}"), source)
    return _Order(source=source, request=request, out=target, exclude=(target, Path(DEFAULT).resolve()))


def _run(order: _Order, *, as_json: bool) -> int:
    """The whole build; its exit status."""
    with open_client() as client:
        with open_phases() as phases:
            build = client.create_build(order.request, _packed(order, phases))
            ended = _follow_or_cancel(client, build, phases, LogStream(to_stderr=as_json))
        return _finish(client, order, build, ended, as_json=as_json)


def _packed(order: _Order, phases: Phases) -> Iterator[bytes]:
    """The source in pieces, with a word on how far it is."""
    from offloadd.builder.source import pack_source

    sent, told = 0, time.monotonic()
    for piece in pack_source(order.source, exclude=order.exclude):
        sent += len(piece)
        if time.monotonic() - told >= _TELL_EVERY_S:
            told = time.monotonic()
            phases.tell(f"sending the source ({format_size(sent)})", None)
        yield piece


def _follow_or_cancel(client: Client, build: str, phases: Phases, log: LogStream) -> Ended:
    try:
        return follow(client.stream("GET", f"/v1/builds/{build}/events"), phases, log)
    except KeyboardInterrupt:
        # Said after the terminal may be gone (SIGHUP); a second Ctrl-C leaves the rest to the daemon.
        with suppress(OSError):
            phases.pause()
            log.end()
            say("cancelling the build (Ctrl-C again: do not wait for it)")
        client.cancel_build(build)
        raise
    except BaseException:
        # Nobody follows it any more: standard error is closed, the connection broke.
        client.cancel_build(build)
        raise


def _finish(client: Client, order: _Order, build: str, ended: Ended, *, as_json: bool) -> int:
    """Tell how it went, and fetch what there is."""
    error = ended.result.get("error")
    if isinstance(error, dict):
        say_error(error_from_json(error))
    shown, kept = dict(ended.result), None
    if ended.state != "cancelled":
        kept = keep_result(client, order.out, build, ended.result, outputs=_outputs(order, ended))
        shown["out"] = str(kept.directory)
    say("\n".join(build_summary(ended.state, ended.result, kept)))
    if as_json:
        print_json(shown)
    return ended.exit_status


def _outputs(order: _Order, ended: Ended) -> str | None:
    """Where the outputs go inside of OUT; None when there is nothing that is whole."""
    if ended.state == "succeeded":
        return ""
    return FAILED if ended.state == "failed" and order.request.keep_failed else None
