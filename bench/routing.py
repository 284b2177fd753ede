"""The router alone, in this process: no daemon, no machine that exists."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from typing import Any

from bench.measure import BenchError, Budget, Row, Series
from offloadd.breaker import Breaker
from offloadd.model.kinds import KINDS
from offloadd.model.machine import Machine, VmMachine
from offloadd.model.state import MachineMode
from offloadd.process import Progress
from offloadd.route import Emulation, MachineFacts, Needs, find_route

X86, ARM = "x86_64-linux", "aarch64-linux"
SYSTEMS = (X86, "i686-linux", ARM, "riscv64-linux", "s390x-linux")
NOW = 1_700_000_000.0
MANY, SOME, REQUESTS = 1_000, 100, 10_000
ONE_TARGET_S, MANY_TARGET_S = 0.002, 10.0

_VM: dict[str, Any] = {"image": "debian", "date": None}
_FIELDS: dict[str, dict[str, Any]] = {
    "local": {"systems": [X86, "i686-linux"]},
    "binfmt": {"systems": [ARM, "riscv64-linux", "s390x-linux"], "speed": 0.2},
    "build-vm": _VM | {"systems": [X86, "i686-linux"]},
    "emulated-vm": _VM | {"systems": [ARM]},
    "childhurd": {"image": "hurd"},
    "ssh": {"systems": [X86, ARM], "host": "h", "host_key": "ssh-ed25519 AAAA", "private_key": "/k"},
}
_EMULATION = {"binfmt": Emulation.USER, "emulated-vm": Emulation.FULL}


def measure_routing(budget: Budget, tell: Progress) -> list[Row]:
    """The rows: one request among many machines, the worst case of which is that all can; many requests among some machines."""
    chance = random.Random(3)  # noqa: S311 - the same machines in every run
    fit, mixed, some = (_park(chance, count, kinds) for count, kinds in ((MANY, ["ssh"]), (MANY, [*KINDS]), (SOME, [*KINDS])))
    one, other, all_requests = Series("every machine can"), Series("machines of all kinds"), Series("mixed requests")
    asked = Needs(system=X86, name="hello", memory_mib=1024, disk=1 << 30, environment="e1", prefer=("m7", "local"))
    requests = [_needs(chance) for _ in range(REQUESTS)]
    if len(find_route(asked, *fit, NOW).candidates) != MANY:
        raise BenchError("not every machine can take the request: the worst case is another one")
    for number in budget.rounds():
        tell(f"round {number + 1}", None)
        for series, park in ((one, fit), (other, mixed)) * 5:
            began = time.perf_counter()
            find_route(asked, *park, NOW)
            series.seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for needs in requests:
            find_route(needs, *some, NOW)
        all_requests.seconds.append(time.perf_counter() - began)
    return [
        _row("route one", f"one request among {MANY:,} machines that all can take it", one, ONE_TARGET_S),
        _row("route one, mixed", f"the same among {MANY:,} machines of all kinds", other, ONE_TARGET_S),
        _row("route many", f"{REQUESTS:,} mixed requests among {SOME} machines of all kinds", all_requests, MANY_TARGET_S),
    ]


def _row(name: str, compares: str, ours: Series, target: float) -> Row:
    return Row(name=name, compares=compares, ours=ours, relation="time", target=target)


def _park(chance: random.Random, count: int, kinds: list[str]) -> tuple[list[Machine], dict[str, MachineFacts]]:
    machines = [_machine(chance, f"m{number}", chance.choice(kinds)) for number in range(count)]
    return machines, {machine.name: _facts(chance, machine, healthy=len(kinds) == 1) for machine in machines}


def _machine(chance: random.Random, name: str, kind: str) -> Machine:
    more = {
        "speed": chance.choice([0.5, 1, 2, 3]),
        "parallel_builds": chance.choice([1, 2, 4]),
        "network": chance.random() < 0.5,
    }
    features = chance.sample(["kvm", "big", "gpu"], chance.randrange(4))
    return KINDS[kind].model_validate({"kind": kind, "name": name, "features": features, **more, **_FIELDS[kind]})


def _facts(chance: random.Random, machine: Machine, *, healthy: bool) -> MachineFacts:
    well = healthy or chance.random() < 0.9
    return MachineFacts(
        systems=machine.systems,
        emulation=_EMULATION.get(machine.kind, Emulation.NONE),
        mode=MachineMode.ONLINE if well else MachineMode.DRAINED,
        breaker=Breaker() if healthy or chance.random() < 0.9 else Breaker(3, NOW + 60),
        running=not isinstance(machine, VmMachine) or chance.random() < 0.3,
        busy=chance.randrange(5),
        load=chance.random(),
        memory_mib=chance.choice([4096, 65536]),
        disk_free=1 << 40,
        environments=frozenset(chance.sample(["e1", "e2", "e3"], 2)),
    )


def _needs(chance: random.Random) -> Needs:
    return Needs(
        system=chance.choice(SYSTEMS),
        name="hello",
        date=datetime(2020, 1, 1, tzinfo=UTC) if chance.random() < 0.2 else None,
        features=frozenset({"kvm"}) if chance.random() < 0.1 else frozenset(),
        network=chance.random() < 0.1,
        memory_mib=chance.choice([None, 1024]),
        environment=chance.choice(["e1", "e2"]),
        prefer=("ssh",) if chance.random() < 0.1 else (),
        quirk="died of SIGILL" if chance.random() < 0.1 else "",
    )
