"""What the clocks of all machines show, and what they should: that of a virtual machine may be shifted on purpose."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trio

from offloadd.daemon.service import Service
from offloadd.errors import AgentError, OffloadError
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import BinfmtMachine, LocalMachine, Machine, SshMachine, VmMachine
from offloadd.model.quantity import format_date, format_duration
from offloadd.model.state import MachineMode
from offloadd.nursery import open_narrow_nursery
from offloadd.place.probe import Probe, probe_ssh
from offloadd.place.vm import AgentShell

LIMIT_S = 10.0
"""For a guest's answer: under emulation it takes a second or two."""


async def clock_rows(service: Service, machines: Mapping[str, Machine]) -> list[dict[str, Any]]:
    """A row for each machine, asked side by side in bounded time.

    `clock` is what it shows, `expected` what it should show, both in seconds since 1970 at about the time `now`; `off_s` is the
    difference.  All are null for what does not run, `clock` and `off_s` for what does not answer, and `off_s` for this host's
    own clock: there is no other to compare it with.
    """
    rows: dict[str, dict[str, Any]] = {}

    async def look(name: str, machine: Machine) -> None:
        rows[name] = await _row(service, machine)

    async with open_narrow_nursery() as nursery:
        for name, machine in machines.items():
            nursery.start_soon(look, name, machine)
    return [rows[name] for name in machines]


@dataclass(frozen=True)
class _Shown:
    """What a machine says of itself."""

    off_s: float
    """What its clock is ahead of what it should show."""
    load: float | None


_Answer = tuple[float | None, _Shown | OffloadError | None]
"""What its clock should show, and what it says, or why it does not; None for what does not run or is not asked."""


async def _row(service: Service, machine: Machine) -> dict[str, Any]:
    database = service.workshop.database
    vm = machine if isinstance(machine, VmMachine) else None
    mode = database.machine_mode(machine.name)
    expected, answer = await _ask(service, machine) if mode is not MachineMode.OFFLINE else (None, None)
    now = time.time()
    shown = answer if isinstance(answer, _Shown) else None
    clock = None if shown is None or expected is None else expected + shown.off_s
    return {
        "name": machine.name,
        "kind": machine.kind,
        "mode": mode,
        "state": database.machine(machine.name).state if vm else None,
        "date": format_date(vm.date) if vm and vm.date else None,
        "now": now,
        "expected": expected,
        "clock": expected if isinstance(machine, LocalMachine | BinfmtMachine) else clock,
        "off_s": shown.off_s if shown else None,
        "load": shown.load if shown else None,
        "fault": answer.what if isinstance(answer, OffloadError) else "",
    }


async def _ask(service: Service, machine: Machine) -> _Answer:
    match machine:
        case SshMachine():
            answer = await service.survey.probes.ask(machine)
            return time.time(), _shown(answer) if isinstance(answer, Probe) else answer
        case VmMachine():
            return await _ask_guest(service, machine.name)
    return time.time(), None


async def _ask_guest(service: Service, name: str) -> _Answer:
    running = service.machines.find(name)
    if running is None or running.instance is None:
        return None, None
    clock = running.instance.record.clock
    if isinstance(running.declared, Childhurd) and not running.declared.offloading:
        return clock(), None  # it has no account for us
    if running.guest is None:
        said = await service.survey.probes.ask_guest(running)
        return clock(), _shown(said) if isinstance(said, Probe) else said
    answer: _Shown | OffloadError = AgentError(f"does not answer within {format_duration(LIMIT_S)}", subject=name)
    with trio.move_on_after(LIMIT_S):
        try:
            answer = _shown(await probe_ssh(AgentShell(running.guest), name, clock))
        except OffloadError as exc:
            answer = exc
    return clock(), answer


def _shown(probe: Probe) -> _Shown:
    return _Shown(probe.clock_offset_s, probe.load)
