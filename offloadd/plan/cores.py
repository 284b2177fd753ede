"""Which host core each virtual CPU is pinned to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def choose_cores(host: Iterable[int], taken: Iterable[Sequence[int]], count: int) -> tuple[int, ...]:
    """One host core for each of `count` virtual CPUs.

    Free cores come first, so that machines that run together have disjoint sets while cores last; after that the least used
    ones are shared evenly.

    Args:
        host: the cores that this process may use.
        taken: the cores of each machine that runs.
    """
    # A machine with more virtual CPUs than cores holds a core once, however many of them sit on it.
    load = Counter(core for cores in taken for core in set(cores))
    order = sorted(set(host), key=lambda core: (load[core], core))
    free = [core for core in order if not load[core]]
    mine = free[:count] or order[:count]
    return tuple(mine[index % len(mine)] for index in range(count))
