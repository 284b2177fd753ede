"""The breaker of one machine: after some failures in a row it is left alone for a while, then tried with one build.

    closed --third failure in a row--> open --its time is over--> half-open --success--> closed
                                        ^                             |
                                        |---- failure: twice as long -|

Only failures that are the machine's own doing count, not builds that fail by themselves.  Nothing here acts or waits: the state
follows from two numbers, which are stored, and the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]

FAILURES = 3
"""So many in a row open it."""
FIRST_PAUSE_S = 60.0
"""Doubled by each failure after that,"""
LONGEST_PAUSE_S = 3600.0
"""up to this."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """The breaker of one machine.  Without failures it is closed."""

    failures: int = 0
    """In a row, up to now."""
    open_until: float = 0.0
    """Unix time; 0 when it was not opened."""

    def state(self, now: float) -> BreakerState:
        """Whether the machine may be given builds: `half-open` means one, to try it.

        Args:
            now: Unix time.
        """
        if self.failures < FAILURES:
            return "closed"
        # An end that is further off than any pause was stored when the host's clock was wrong: do not wait for that day.
        return "open" if now < self.open_until <= now + LONGEST_PAUSE_S else "half-open"

    def after_failure(self, now: float) -> Breaker:
        """The breaker after the machine failed once more.

        A failure while it is open is one of a build that began before: the machine's end takes all its builds with it, which
        says no more than the first of them did.
        """
        if self.state(now) == "open":
            return self
        failures = self.failures + 1
        if failures < FAILURES:
            return Breaker(failures)
        # The exponent is bounded too: no float holds 2 ** 1024.
        doubled = min(failures - FAILURES, 10)
        return Breaker(failures, now + min(FIRST_PAUSE_S * 2**doubled, LONGEST_PAUSE_S))

    def after_success(self) -> Breaker:
        """The breaker after a build came to its end on the machine, good or bad: closed, and all is forgotten."""
        return Breaker()
