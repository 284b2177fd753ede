"""The host cores that are given out to machines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from offloadd.plan.cores import choose_cores


class Cores:
    """Who has which cores; one for the whole daemon, so that two machines that start together do not get the same."""

    def __init__(self) -> None:
        self._taken: list[Sequence[int]] = []

    @contextmanager
    def share(self, count: int) -> Iterator[tuple[int, ...]]:
        """One core for each of `count` virtual CPUs, for as long as the block lasts."""
        chosen = choose_cores(os.sched_getaffinity(0), self._taken, count)
        with self.hold(chosen):
            yield chosen

    @contextmanager
    def hold(self, cores: Sequence[int]) -> Iterator[None]:
        """Cores that a machine of an earlier daemon has already."""
        mine = list(cores)
        self._taken.append(mine)
        try:
            yield
        finally:
            self._taken = [taken for taken in self._taken if taken is not mine]
