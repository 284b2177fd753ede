"""Which machine takes a build, and why the others do not.  A pure function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offloadd.errors import NoMachineError
from offloadd.model.machine import Machine
from offloadd.model.quantity import check_clock_holds
from offloadd.model.recipe import BuildRequest


@dataclass(frozen=True, kw_only=True)
class Route:
    """The machine, and the reason for each that was passed over."""

    machine: Machine
    passed_over: dict[str, str]


def find_route(request: BuildRequest, machines: Iterable[Machine]) -> Route:
    """The first machine by name that can do it; the order of the files does not matter.

    Raises:
        NoMachineError: none can, with every reason.
    """
    passed_over: dict[str, str] = {}
    fit: list[Machine] = []
    for machine in sorted(machines, key=lambda machine: machine.name):
        reason = _obstacle(request, machine)
        if reason:
            passed_over[machine.name] = reason
        else:
            fit.append(machine)
    if not fit:
        detail = "\n".join(f"{name}: {reason}" for name, reason in passed_over.items())
        raise NoMachineError("no machine can do this build", subject=request.recipe.name, detail=detail, hint="offload vm list")
    passed_over |= {machine.name: f"{fit[0].name} comes first" for machine in fit[1:]}
    return Route(machine=fit[0], passed_over=passed_over)


def _obstacle(request: BuildRequest, machine: Machine) -> str:
    """Why the machine cannot take the build; empty when it can."""
    if request.machine and machine.name != request.machine:
        return f"{request.machine} was asked for"
    if not set(request.recipe.systems) & set(machine.systems):
        return f"builds {', '.join(machine.systems)}, not {', '.join(request.recipe.systems)}"
    if request.asked_date is not None:
        try:
            check_clock_holds(request.asked_date, machine.systems[0])
        except ValueError as exc:
            return str(exc)
    return ""
