"""What a measurement is: two things timed in turn, and what their times say about each other."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

Relation = Literal["ratio", "difference", "time", "rate"]
"""`time`: there is nothing to compare with; the target is in seconds.  `rate`: the same, told as how many a minute."""

_END_S = 15


class BenchError(Exception):
    """Something could not be measured; the text says why."""


@dataclass(frozen=True, eq=False)
class Series:
    """One thing, timed several times, in seconds."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def shown(self) -> str:
        """`2.10 s (1.98-2.40, n=5)`."""
        unit, times = ("ms", 1000) if self.median < 1 else ("s", 1)
        digits = 2 if unit == "s" or self.median < 0.01 else 0
        low, high = min(self.seconds) * times, max(self.seconds) * times
        return f"{self.median * times:.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f}, n={len(self.seconds)})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A comparison.

    The relation is the median over the rounds, each of which timed both within a short time: what slows the machine down for
    a while slows both.
    """

    name: str
    compares: str
    ours: Series
    base: Series | None = None
    relation: Relation = "ratio"
    target: float | None = None
    """At most this ratio, this many seconds more, or this many seconds; None when it is for information."""
    why_not: str = ""
    """Why it could not be measured; then the series are empty."""
    drawn: bool = False
    """In the picture."""

    @property
    def value(self) -> float | None:
        if self.why_not:
            return None
        if self.relation == "time":
            return self.ours.median
        if self.relation == "rate":
            return 60 / self.ours.median
        if self.base is None:
            return None
        pairs = list(zip(self.ours.seconds, self.base.seconds, strict=True))
        return median(ours / base if self.relation == "ratio" else ours - base for ours, base in pairs)

    @property
    def met(self) -> bool | None:
        return None if self.value is None or self.target is None else self.value <= self.target


class Budget:
    """How long one part may take: a few rounds always, more while there is time."""

    def __init__(self, seconds: float, *, least: int, most: int) -> None:
        self._end = time.monotonic() + seconds
        self._least = least
        self._most = most

    def rounds(self) -> Iterator[int]:
        """The number of each round, from 0, until the next one would take too long."""
        longest = 0.0
        for number in range(self._most):
            began = time.monotonic()
            if number >= self._least and began + longest > self._end:
                return
            yield number
            longest = max(longest, time.monotonic() - began)


def in_turn(number: int, *work: str) -> Sequence[str]:
    """The order of round `number`: nobody is always the one to find warm caches."""
    return work if number % 2 == 0 else work[::-1]


def time_program(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, limit_s: float = 300
) -> float:
    """Seconds from start to end.

    Raises:
        BenchError: it is missing, fails or takes too long; with the end of what it said.
    """
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as exc:
        raise BenchError(f"{argv[0]}: {exc.strerror}") from exc
    with process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except BaseException as exc:
            _end_group(process)
            if isinstance(exc, subprocess.TimeoutExpired):
                raise BenchError(f"{argv[0]} took longer than {limit_s:.0f} s") from exc
            raise
        took = time.monotonic() - began
    if process.returncode:
        tail = said.decode(errors="replace")[-2000:]
        raise BenchError(f"{' '.join(argv)[:200]} ended with status {process.returncode}:\n{tail}")
    return took


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Politely first: mmdebstrap has mounts to undo."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_END_S)
            return
