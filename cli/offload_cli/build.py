"""`offload build`: send the source, follow the build, bring the result back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.complete import machine_names, prefer_names, system_names
from offload_cli.connection import open_client
from offload_cli.order import Done, Order, carry_out, own_files
from offload_cli.phases import open_phases
from offload_cli.request import Request
from offload_cli.result import DEFAULT, check_out, default_out
from offload_cli.route import decision_table, source_line
from offload_cli.show import build_summary
from offload_cli.side_by_side import Run, carry_out_all, last_lines
from offload_cli.target import DebianOptions, Target, find_target
from offload_cli.terminal import LogStream, clean, print_json, print_text, say, say_error, terminal_width
from offload_cli.words import WithCommand, json_option, tail
from offloadd.errors import NoMachineError, OffloadError, error_from_json
from offloadd.model.asked import Changes

if TYPE_CHECKING:
    from offloadd.client import Client


def build(
    ctx: typer.Context,
    what: str | None = typer.Argument(
        None,
        metavar="[WHAT]",
        show_default=False,
        help="A directory (by default this one), a Debian package, a .dsc, guix:NAME.",
    ),
    system: list[str] = typer.Option(
        [], "-s", "--system", metavar="SYSTEM", autocompletion=system_names, help="The system type to build for; repeatable."
    ),
    all_systems: bool = typer.Option(False, "--all-systems", help="Build for every system type that the recipe names."),
    date: str | None = typer.Option(
        None, metavar="DATE", help="The clock at the first step: 2020-01-01, '2 years ago', @SECONDS, or auto: the release's."
    ),
    cpu: str | None = typer.Option(None, metavar="MODEL", help="The CPU model, in QEMU's words; by default one of that time."),
    kernel: str | None = typer.Option(None, metavar="VERSION", help="What the kernel's version must begin with."),
    machine: str | None = typer.Option(None, metavar="NAME", autocompletion=machine_names, help="Only this machine."),
    prefer: list[str] = typer.Option(
        [], metavar="NAME", autocompletion=prefer_names, help="A machine or kind to take first of those that can; repeatable."
    ),
    feature: list[str] = typer.Option([], metavar="LABEL", help="What the machine must offer; repeatable."),
    keep_machine: bool = typer.Option(
        False, "--keep-machine", help="Build in the machine that you started with `offload vm start`, and leave it running."
    ),
    network: bool = typer.Option(False, "--network", help="Give the steps the network, on a machine that allows it."),
    explain: bool = typer.Option(False, "--explain", help="Show which machine would take it, and why; build nothing."),
    out: Path | None = typer.Option(
        None, "-o", "--out", metavar="OUT", help="Where the result goes; by default offload-out/NAME-VERSION."
    ),
    timeout: str | None = typer.Option(None, metavar="TIME", help="End the build after this time: 90, 10m, 2h."),
    max_silent_time: str | None = typer.Option(None, metavar="TIME", help="End the build when it is silent for this long."),
    keep_failed: bool = typer.Option(False, "--keep-failed", help="Bring a failed build's directory back, to OUT/failed."),
    suite: str | None = typer.Option(None, metavar="SUITE", help="The Debian suite; by default bookworm or the recipe's."),
    package: list[str] = typer.Option([], "-p", "--package", metavar="PKG", help="A Debian package that it needs; repeatable."),
    output: list[str] = typer.Option([], "--output", metavar="PATTERN", help="What to bring back; repeatable."),
    build_option: list[str] = typer.Option(
        [], metavar="WORD", help="A word of DEB_BUILD_OPTIONS, for a Debian package; repeatable."
    ),
    no_check: bool = typer.Option(False, "--no-check", help="Skip a Debian package's own tests."),
    as_json: bool = json_option(),
) -> None:
    """Build on the machine that it needs, and bring the result back.

    WHAT is a directory with an offload.yaml (or the command to run is given after `--`), a Debian source package
    (NAME or NAME=VERSION), a .dsc file, or guix:NAME, which a guest builds with its own Guix.  The build's log goes to
    standard output and to OUT/build.log.

    In a virtual machine each build has a guest that nobody has used before and nobody uses again; with --keep-machine it
    is done in the machine that runs for you, which is started when it does not, without a date of its own.

    \b
    Examples:
      offload build -s aarch64-linux hello
      offload build --date 2020-06-01 examples/time-trap
      offload build -s amd64 -s i386 -s arm64 --no-check ./hello_2.10-3.dsc
      offload build -p gcc -p make --output hello -o result ./hello -- make hello
      offload build --explain -s arm64 hello
      offload build -s i586-gnu guix:hello
    """
    requirements = {"suite": suite, "kernel": kernel, "features": tuple(feature) or None, "network": network or None}
    changes = Changes(
        command=tail(ctx),
        packages=tuple(package),
        outputs=tuple(output),
        requirements={name: value for name, value in requirements.items() if value is not None},
    )
    options = {
        "date": date,
        "cpu": cpu,
        "machine": machine,
        "prefer": tuple(prefer),
        "timeout": timeout,
        "max-silent-time": max_silent_time,
        "keep-failed": keep_failed,
        "keep-machine": keep_machine,
    }
    try:
        target = find_target(what, changes, DebianOptions(build_options=tuple(build_option), check=not no_check))
        with open_client() as client:
            requests = target.requests(client, options=options, systems=tuple(system), all_systems=all_systems)
            if explain:
                status = _explain(client, target, out, requests, as_json=as_json)
            else:
                orders = _orders(target, requests, out)
                status = _several(orders, as_json=as_json) if len(orders) > 1 else _one(client, orders[0], as_json=as_json)
    except OffloadError as exc:
        if as_json:
            print_json({"state": "errored", "error": exc.to_json()})
        raise
    raise typer.Exit(status)


def _orders(target: Target, requests: Sequence[Request], out: Path | None) -> list[Order]:
    """Each request, and where its result goes."""
    orders = []
    for request in requests:
        system = request["system"]
        if out is None:
            name = target.name or "{name}-{version}".format(**request["recipe"])
            folder = default_out(f"{name}-{system}" if system else name)
        else:
            folder = out / system if len(requests) > 1 else out
        orders.append(Order(target=target, request=request, out=check_out(folder, target.source)))
    return orders


def _explain(client: Client, target: Target, out: Path | None, requests: Sequence[Request], *, as_json: bool) -> int:
    """Show where they would go, and how; 0 when each of them has a machine."""
    source = _source_facts(target, out)
    decisions = [{**client.post("/v1/route", request), "source": source} for request in requests]
    if as_json:
        print_json(decisions if len(decisions) > 1 else decisions[0])
    else:
        if found := requests[0]["released"]:
            say(f"the date is {found['date']}: {found['origin']}")
        print_text("\n\n".join(decision_table(decision, terminal_width()) for decision in decisions))
        if source is not None:
            print_text(source_line(source))
    return 0 if all(decision["machine"] for decision in decisions) else NoMachineError.exit_status


def _source_facts(target: Target, out: Path | None) -> dict[str, Any] | None:
    """How much would be sent, and what it would go by to a VM; None when nothing would be: the daemon fetches it."""
    from offloadd.builder.bulk import bulk_channel

    if target.directory is None and not target.files:
        return None
    size = target.size(own_files(out or Path(DEFAULT)))
    return {"size": size, "channel_to_vms": bulk_channel(size)}


def _one(client: Client, order: Order, *, as_json: bool) -> int:
    """The whole build; its exit status."""
    with open_phases() as phases:
        done = carry_out(client, order, phases, LogStream(to_stderr=as_json), lambda build: None)
    _tell(done)
    if as_json:
        print_json(done.to_json())
    return done.ended.exit_status


def _tell(done: Done) -> None:
    _tell_error(done.ended.result.get("error"))
    say("\n".join(build_summary(done.ended.state, done.ended.result, done.kept)))


def _tell_error(error: object) -> None:
    if isinstance(error, Mapping):
        say_error(error_from_json(dict(error)))


def _several(orders: list[Order], *, as_json: bool) -> int:
    """All of them side by side; the exit status of the worst."""
    runs = carry_out_all([(order.request["system"], order) for order in orders])
    for run in runs:
        _tell_run(run)
    if as_json:
        print_json([_run_json(run) for run in runs])
    return max(run.exit_status for run in runs)


def _tell_run(run: Run) -> None:
    if run.error is not None:
        say(clean(f"{run.name}: {run.error.render()}"))
    elif run.done is not None:
        if run.done.ended.exit_status:
            say(f"{run.name}: the log ends with\n{last_lines(clean(run.done.log))}")
        _tell(run.done)


def _run_json(run: Run) -> dict[str, Any]:
    if run.done is not None:
        return run.done.to_json()
    return {"system": run.name, "state": "errored", "error": run.error.to_json() if run.error else None}


def add_to(commands: typer.Typer) -> None:
    """Add `offload build`."""
    commands.command(cls=WithCommand)(build)
