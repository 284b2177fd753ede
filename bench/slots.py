"""How many builds a minute one machine does, by how many it may do at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from bench.measure import Budget, Row, Series, in_turn
from bench.workplace import OTHER_DATE, Workplace
from offloadd.process import Progress

SLOTS = (1, 2, 4)
BUILDS = 4
"""At once, of which the machine takes as many as it has slots."""


def measure_slots(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """A row for each number of slots."""
    series = {f"slots-{slots}": Series(f"{slots} slots") for slots in SLOTS}
    for name, slots in zip(series, SLOTS, strict=True):
        place.add_machine(name, f"parallel-builds: {slots}\n")
    tell("making the environment", None)
    place.build("--date", OTHER_DATE)
    for number in budget.rounds():
        for name in in_turn(number, *series):
            tell(f"round {number + 1}, {name}", None)
            series[name].seconds.append(_time_builds(place, name) / BUILDS)
    compares = (
        f"{BUILDS} no-op builds handed in at once, each in a VM of its own, the machine takes {{}} at once; seconds a build"
    )
    return [
        Row(
            name=f"builds a minute, {slots} slot{'s' * (slots > 1)}",
            compares=compares.format(slots),
            ours=series[f"slots-{slots}"],
            relation="rate",
        )
        for slots in SLOTS
    ]


def _time_builds(place: Workplace, machine: str) -> float:
    began = monotonic()
    with ThreadPoolExecutor(BUILDS) as pool:
        builds = [
            pool.submit(place.build, "--date", OTHER_DATE, machine=machine, out=f"out-{number}") for number in range(BUILDS)
        ]
        for build in builds:
            build.result()
    return monotonic() - began
