"""The decision: candidates ranked by cost, and the reason for each other machine.

A thousand machines take about a millisecond: a cost stays the bare tuple of its parts until somebody looks at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from operator import itemgetter
from typing import Any, NamedTuple

from offloadd.errors import NoMachineError
from offloadd.model.machine import Machine, VmMachine
from offloadd.route.needs import Emulation, MachineFacts, Needs
from offloadd.route.obstacle import (
    UNSEEN,
    Question,
    Tell,
    find_obstacle,
    tell_asked,
    tell_fault,
    tell_features,
    tell_kernel_of_host,
    tell_missing,
    tell_mode,
    tell_open,
    tell_system,
    tell_trial,
)


class Cost(NamedTuple):
    """Compared part by part in this order; less is better."""

    wish: int
    """Below 0 when it is preferred: the first in `Needs.prefer` is the least."""
    overloaded: bool
    emulation: Emulation
    full: bool
    """No slot is free.  Stands before `cold`: a boot takes seconds, a queue may take hours."""
    cold: bool
    """A machine must be booted first."""
    slot_load: float
    """Builds for each slot."""
    slowness: float
    """1 / speed."""
    stranger: bool
    """The environment is not there yet."""
    name: str
    """So that two machines never cost the same, and the order of their files does not matter."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A machine that can and may take the build."""

    machine: Machine
    cost: Cost
    facts: MachineFacts
    asked_to_keep: bool = False

    @property
    def keeps(self) -> bool:
        """Whether the build is done in the machine that runs for its user."""
        return self.asked_to_keep or self.facts.stateful

    @property
    def why(self) -> str:
        """What its place comes from, in one line: `native, has a template, 1 of 2 slots free`."""
        cost, facts = self.cost, self.facts
        parts = [
            "preferred" if cost.wish < 0 else "",
            f"overloaded (load {facts.load:.2f} for each core)" if cost.overloaded else "",
            cost.emulation.label,
            self._start(),
            self._slots(),
            f"speed {self.machine.speed:g}" if self.machine.speed != 1 else "",
            "" if cost.stranger else "has the environment",
            f"on trial after {facts.breaker.failures} failures" if facts.breaker.open_until else "",
        ]
        return ", ".join(part for part in parts if part)

    def _start(self) -> str:
        """What stands between the build and its first step."""
        if not isinstance(self.machine, VmMachine):
            return "" if not self.cost.cold else "not running"
        if self.keeps:
            return "has to be started" if self.cost.cold else "runs"
        return "has to boot" if self.cost.cold else "has a template"

    def _slots(self) -> str:
        slots, busy = self.machine.parallel_builds, self.facts.busy
        if busy < slots:
            return f"{slots - busy} of {slots} {'slot' if slots == 1 else 'slots'} free"
        return f"no slot free, {busy - slots} waiting" if busy > slots else "no slot free"

    def to_json(self) -> dict[str, Any]:
        """Name, kind, why and the parts of the cost."""
        parts = self.cost._asdict() | {"emulation": self.cost.emulation.name.lower()}
        return {"machine": parts.pop("name"), "kind": self.machine.kind, "why": self.why, **parts}


_Obstacle = tuple[Tell, Machine, MachineFacts]
_Parts = tuple[int, bool, Emulation, bool, bool, float, float, bool, str]
_Ranked = tuple[_Parts, Machine, MachineFacts]


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """Who can, best first, and why the others cannot: each machine is in one of the two.  Made by `find_route` alone."""

    question: Question = field(repr=False)
    ranked: tuple[_Ranked, ...] = field(repr=False)
    obstacles: tuple[_Obstacle, ...] = field(repr=False)

    @property
    def needs(self) -> Needs:
        return self.question.needs

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Those that can and may take it, best first."""
        keeps = self.needs.keep_machine
        return tuple(Candidate(machine, Cost._make(parts), known, keeps) for parts, machine, known in self.ranked)

    @cached_property
    def passed_over(self) -> dict[str, str]:
        """Name -> reason, by name."""
        reasons = {machine.name: tell(self.question, machine, known) for tell, machine, known in self.obstacles}
        return dict(sorted(reasons.items()))

    @cached_property
    def unrelated(self) -> tuple[str, ...]:
        """The names of those that are passed over because they build for other system types."""
        return tuple(sorted(machine.name for tell, machine, _ in self.obstacles if tell is tell_system))

    @property
    def retry_at(self) -> float | None:
        """When a machine that is only left alone for a while may be tried, in seconds since 1970.

        Infinite: when the build that tries one has ended.  None: no machine is left alone.
        """
        ends = [known.breaker.open_until for tell, _, known in self.obstacles if tell is tell_open]
        trials = [inf for tell, _, _ in self.obstacles if tell is tell_trial]
        return min([*ends, *trials], default=None)

    def best(self) -> Machine:
        """The first candidate.

        Raises:
            NoMachineError: there is none; with every reason, first that of the machine that was asked for, last
                those of machines for other system types.
        """
        if self.ranked:
            return self.ranked[0][1]
        asked = self.needs.machine
        names = sorted(self.passed_over, key=lambda name: (name != asked, name in self.unrelated, name))
        detail = "\n".join(f"{name}: {self.passed_over[name]}" for name in names)
        what = f"{asked} cannot do this build" if asked else "no machine can do this build"
        raise NoMachineError(what, subject=self.needs.name, detail=detail, hint=self._hint())

    def _hint(self) -> str:
        if able := sorted(machine.name for tell, machine, _ in self.obstacles if tell is tell_asked):
            return f"without --machine it could go to {', '.join(able[:3])}{' and others' if len(able) > 3 else ''}"
        asked = self.needs.machine
        near = [
            (tell, machine, known)
            for tell, machine, known in self.obstacles
            if tell not in (tell_system, tell_kernel_of_host) and asked in (None, machine.name)
        ]
        tells = {tell for tell, _, _ in near}
        if tells == {tell_missing} and any(machine.kind == "binfmt" for _, machine, _ in near):
            return f"offload binfmt register {self.needs.system}"
        if tells == {tell_mode}:
            return f"offload machine resume {min(machine.name for _, machine, _ in near)}"
        if tells == {tell_fault} and (remedies := sorted({known.remedy for _, _, known in near if known.remedy})):
            return remedies[0]
        if not near and asked is None and self.question.on_hurd:
            return f"declare a machine of kind childhurd that builds for {self.needs.system}: docs/childhurd.md"
        if (not near or tell_features in tells) and (elsewhere := self._with_features()):
            return elsewhere
        return "offload machine list"

    def _with_features(self) -> str:
        """Who has the features, and builds for another system type."""
        wanted = self.needs.features
        able = [
            (machine.name, known.systems[0])
            for tell, machine, known in self.obstacles
            if tell is tell_system and wanted and known.systems and wanted.issubset(machine.features)
        ]
        if not able:
            return ""
        name, system = min(able)
        return f"{name} has {', '.join(sorted(wanted))}, and builds for {system}: -s {system}"

    def to_json(self) -> dict[str, Any]:
        """The decision as JSON types."""
        return {
            "system": self.needs.system,
            "machine": self.ranked[0][1].name if self.ranked else None,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "passed_over": dict(self.passed_over),
            "kinds": {machine.name: machine.kind for _, machine, _ in sorted(self.obstacles, key=_by_name)},
            "unrelated": [*self.unrelated],
            "hint": "" if self.ranked else self._hint(),
        }


def find_route(needs: Needs, machines: Iterable[Machine], facts: Mapping[str, MachineFacts], now: float) -> Decision:
    """Rank the machines that can and may take the build; nothing is raised, and the order of `machines` does not matter.

    Args:
        facts: by name; a machine that is not in it is passed over.
        now: Unix time, for the breakers.
    """
    question = Question(needs, now)
    ranked: list[_Ranked] = []
    obstacles: list[_Obstacle] = []
    for machine in machines:
        known = facts.get(machine.name, UNSEEN)
        tell = find_obstacle(question, machine, known)
        if tell is None:
            ranked.append((_cost(question, machine, known), machine, known))
        else:
            obstacles.append((tell, machine, known))
    ranked.sort(key=_by_cost)
    return Decision(question=question, ranked=tuple(ranked), obstacles=tuple(obstacles))


_by_cost = itemgetter(0)


def _by_name(obstacle: _Obstacle) -> str:
    return obstacle[1].name


def _cost(question: Question, machine: Machine, known: MachineFacts) -> _Parts:
    """The parts of `Cost`."""
    needs, wishes, name = question.needs, question.wishes, machine.name
    slots, load, threshold = machine.parallel_builds, known.load, machine.overload_threshold
    return (
        min(wishes.get(name, 0), wishes.get(machine.kind, 0)) if wishes else 0,
        load is not None and threshold is not None and load > threshold,
        known.emulation,
        known.busy >= slots,
        not (known.started if needs.keep_machine or known.stateful else known.running),
        known.busy / slots,
        1 / machine.speed,
        needs.environment not in known.environments,
        name,
    )
