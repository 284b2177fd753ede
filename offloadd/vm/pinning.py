"""The host cores that are given out to machines, and the virtual CPUs that sit on them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from offloadd.errors import HostError
from offloadd.plan.cores import choose_cores
from offloadd.vm.qmp import Qmp


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


async def pin(qmp: Qmp, cores: Sequence[int]) -> None:
    """Put each virtual CPU on its core; where they are more than the cores, all of them on all of these.

    To tie two to one core would leave another one idle while both are busy: the guest takes them for two.

    Raises:
        HostError: the kernel does not let us.
        MachineLostError: QEMU went away.
    """
    # `options` of the machine may give QEMU more virtual CPUs than `cpu-count`.
    cpus = await qmp.execute("query-cpus-fast")
    alone = len(set(cores)) >= len(cpus)
    for number, cpu in enumerate(cpus):
        mine = {cores[number]} if alone else set(cores)
        try:
            os.sched_setaffinity(cpu["thread-id"], mine)
        except OSError as exc:
            raise HostError(f"cannot pin a virtual CPU to {mine}: {exc.strerror}", subject=qmp.instance) from exc
