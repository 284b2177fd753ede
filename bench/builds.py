"""Builds as their user sees them, from the shell and back, against the bare `ssh`."""

from __future__ import annotations

import sys

from bench.login import make_login
from bench.measure import Budget, Row, Series, in_turn, time_program
from bench.workplace import MACHINE, OTHER_DATE, Workplace
from offloadd.process import Progress

WARM = "waiting"
"""A machine that keeps a clone ready."""


def measure_running(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """Builds on a machine that runs."""
    build, ssh, list_time = Series("offload build"), Series("ssh true"), Series("offload vm list")
    tell("starting the machine, making the environment", None)
    place.run("vm", "start", MACHINE, limit_s=600)
    place.build("--keep-machine")
    argv = [*make_login(place.ask("vm", "show", MACHINE), place.folder).ssh, "true"]
    time_program(argv)
    for number in budget.rounds():
        for name in in_turn(number, "build", "ssh"):
            tell(f"round {number + 1}, {name}", None)
            if name == "build":
                build.seconds.append(place.build("--keep-machine"))
            else:
                ssh.seconds.append(time_program(argv))
        list_time.seconds.append(place.run("vm", "list"))
    place.run("vm", "stop", MACHINE)
    return [
        Row(
            name="build on a running VM",
            compares="`offload build --keep-machine` of a one-line recipe : `ssh ... true` into the same VM",
            ours=build,
            base=ssh,
            relation="difference",
            target=2.0,
        ),
        Row(name="list machines", compares="`offload vm list`, the daemon runs", ours=list_time),
    ]


def measure_own_vm(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """A build at another date, in a guest that nobody has used: one that is cloned for it, and one that waited for it."""
    cloned, waited = Series("offload build --date, cloned"), Series("offload build --date, waiting")
    place.add_machine(WARM, "warm: 1\n")
    # The first ones make the template, and have the pool begin.
    place.build("--date", OTHER_DATE)
    place.build("--date", OTHER_DATE, machine=WARM)
    for number in budget.rounds():
        tell(f"build {number + 1} in a VM of its own", None)
        place.wait_for_clone(number + 1)
        waited.seconds.append(place.build("--date", OTHER_DATE, machine=WARM))
        cloned.seconds.append(place.build("--date", OTHER_DATE))
    compares = "`offload build --date` of a one-line recipe, from the shell and back: a fresh guest, build, end of the guest"
    return [
        Row(name="no-op build, a waiting clone", compares=compares, ours=waited, relation="time", target=0.6),
        Row(name="no-op build, a clone made for it", compares=compares, ours=cloned, relation="time"),
    ]


def measure_command(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """How long the command line takes to start."""
    help_time, python = Series("offload --help"), Series("python")
    interpreter = [sys.executable, "-c", "pass"]
    place.run("--help")
    for number in budget.rounds():
        for name in in_turn(number, "help", "python"):
            if name == "help":
                help_time.seconds.append(place.run("--help"))
            else:
                python.seconds.append(time_program(interpreter))
    tell("the command line is measured", None)
    compares = "`offload --help` : `python -c pass`"
    return [Row(name="start of the command", compares=compares, ours=help_time, base=python, relation="difference")]
