"""Several ways to the same thing, timed in turn: each round goes every way once.

A way of somebody else's tool that is missing, or does not work here, is a row that says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten

from bench.measure import BenchError, Budget, Row, Series, in_turn
from offloadd.process import Progress


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a way is timed to."""

    series: Series
    """Its name is the row's."""
    what: str
    """The left side of the comparison."""
    target: float | None = None
    """At most this share of the base."""
    limit_s: float | None = None
    """At most this long: a row of its own."""


@dataclass(kw_only=True)
class Way:
    """One way to get there."""

    name: str
    points: tuple[Point, ...]
    go: Callable[[], Awaitable[Sequence[float]]]
    """Goes it once and says when each point was reached, in seconds since it began.  Raises BenchError."""
    foreign: bool = False
    """Somebody else's: that it fails is a result."""
    why_not: str = ""
    """Why it is not gone at all."""


async def go_in_turn(ways: Sequence[Way], budget: Budget, tell: Progress) -> None:
    """Fill the ways' series.

    Raises:
        BenchError: one of ours failed.
    """
    by_name = {way.name: way for way in ways}
    for number in budget.rounds():
        for name in in_turn(number, *by_name):
            if not by_name[name].why_not:
                tell(f"round {number + 1}, {name}", None)
                await _go(by_name[name])
                if why_not := by_name[name].why_not:
                    tell(f"{name}: {why_not}", None)


async def _go(way: Way) -> None:
    try:
        times = await way.go()
    except BenchError as exc:
        if not way.foreign:
            raise
        way.why_not = shorten(str(exc), 300)
        for point in way.points:
            # Half a series has no partner in every round.
            point.series.seconds.clear()
        return
    for point, seconds in zip(way.points, times, strict=True):
        point.series.seconds.append(seconds)


def way_rows(ways: Sequence[Way], base: Point, *, drawn: bool) -> list[Row]:
    """A row for each point but `base`, which they are compared with, and one for each limit."""
    rows = []
    points = [(point, way.why_not) for way in ways for point in way.points if point is not base]
    for point, why_not in points:
        row = Row(
            name=point.series.name,
            compares=f"{point.what} : {base.what}",
            ours=point.series,
            base=base.series,
            target=point.target,
            why_not=why_not,
            drawn=drawn,
        )
        rows.append(row)
        if point.limit_s is not None:
            alone = replace(row, compares=point.what, base=None, relation="time", target=point.limit_s, drawn=False)
            rows.append(alone)
    return rows
