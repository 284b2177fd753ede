"""Which paused clones are kept, given up and made: decided from what is known, without doing anything.

There are two kinds.  One that is `started` stands where the template was saved, and has not run: it costs little, and spares a
build QEMU's own start.  One that is `warm` has run what every build runs, and waits in the environment of the last build.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from offloadd.daemon.host_memory import HostMemory

Kind = Literal["started", "warm"]

IDLE_S = 600.0
"""Without a build on its machine, after which a clone is given up."""
CALM_S = 1.0
"""Since the last build got its guest or ended: none is warmed while a build begins, which needs the processors itself."""
RECOVERY_S = 60.0
"""Since memory was short, before clones are made again."""
PRESSURE_LIMIT = 10.0
"""Percent: by then a tenth of the time is lost to waiting for memory, which costs builds more than clones save them."""
FLOOR, ROOM = 10, 4
"""Parts of the host's memory: less than a tenth available is short; a clone is made when it leaves a quarter."""
_SHARE = 8
_LEAST = 128 << 20
_STARTED = 64 << 20
"""Bytes; measured: 45 MB, of which the saved state is 3."""


@dataclass(frozen=True, kw_only=True)
class Want:
    """What builds have used last on a machine, and how many of it shall wait."""

    machine: str
    kind: Kind
    digest: str
    """Of the template."""
    count: int
    memory_mib: int
    used: float
    """When, in seconds of the caller's clock, as all times here."""

    @property
    def cost(self) -> int:
        """Bytes that one more needs.

        Measured for a warm one: 90 MB whatever the guest's memory, as the template's pages are shared and those that nobody has
        touched do not exist.  More is counted for larger guests: a machine has much memory where builds write much, and they do
        so right after they have taken a clone.
        """
        return _STARTED if self.kind == "started" else max(_LEAST, (self.memory_mib << 20) // _SHARE)

    def is_served_by(self, idle: Idle) -> bool:
        return (self.machine, self.kind, self.digest) == (idle.machine, idle.kind, idle.digest)


@dataclass(frozen=True, kw_only=True)
class Idle:
    """A clone that waits."""

    name: str
    machine: str
    kind: Kind
    digest: str
    since: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known when the pool is looked at."""

    now: float
    memory: HostMemory
    idle: Sequence[Idle]
    wants: Sequence[Want]
    """At most one of each kind for each machine."""
    last_move: float
    """When a build last got its guest or ended."""
    last_short: float
    making: bool
    """Whether one is being made: one at a time."""
    failed: Collection[str] = ()
    """Templates whose clones have failed lately."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done."""

    short: bool
    """Memory is short."""
    give_up: Sequence[str]
    """Names of clones."""
    make: Want | None
    """What one more is made of."""
    unload_s: float
    """Templates that nobody has used for so long leave the memory."""


def judge_pool(facts: Facts) -> Verdict:
    """Look at the pool."""
    wants = sorted((want for want in facts.wants if facts.now - want.used < IDLE_S), key=lambda want: want.used, reverse=True)
    kept, surplus = _sort(facts.idle, wants)
    short = is_short(facts.memory)
    given_up = [*surplus, *kept[:1]] if short else surplus
    return Verdict(
        short=short,
        give_up=[idle.name for idle in given_up],
        make=None if short else _choose(facts, wants, kept),
        # Clones come first: what a template holds is of use to the next build, whatever its machine's file says.
        unload_s=IDLE_S if kept or not short else 0.0,
    )


def is_short(memory: HostMemory) -> bool:
    """Whether others need the memory more."""
    if memory.pressure is not None:
        return memory.pressure > PRESSURE_LIMIT
    return memory.available * FLOOR < memory.total


def has_room(memory: HostMemory, size: int) -> bool:
    """Whether `size` bytes more leave enough for others."""
    return memory.total > 0 and (memory.available - size) * ROOM >= memory.total


def _sort(idle: Sequence[Idle], wants: Sequence[Want]) -> tuple[list[Idle], list[Idle]]:
    """Those that are wanted and the others, the oldest first."""
    left = {(want.machine, want.kind, want.digest): want.count for want in wants}
    kept, surplus = list[Idle](), list[Idle]()
    # The youngest of too many are kept: the others have been paged out first.
    for one in sorted(idle, key=lambda one: one.since, reverse=True):
        key = (one.machine, one.kind, one.digest)
        left[key] = left.get(key, 0) - 1
        (kept if left[key] >= 0 else surplus).insert(0, one)
    return kept, surplus


def _choose(facts: Facts, wants: Sequence[Want], kept: Sequence[Idle]) -> Want | None:
    """What is made next: for the machine that was used last."""
    if facts.making or facts.now - facts.last_short < RECOVERY_S:
        return None
    calm = facts.now - facts.last_move >= CALM_S
    for want in wants:
        due = sum(map(want.is_served_by, kept)) < want.count and (calm or want.kind == "started")
        if due and want.digest not in facts.failed and has_room(facts.memory, want.cost):
            return want
    return None
