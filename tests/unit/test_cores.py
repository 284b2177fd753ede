"""Host cores for virtual CPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.plan.cores import choose_cores
from offloadd.vm.pinning import Cores

hosts = st.sets(st.integers(0, 63), min_size=1, max_size=16)
counts = st.lists(st.integers(1, 8), max_size=6)


@given(hosts, counts, st.integers(1, 16))
def test_one_host_core_for_each_virtual_cpu(host: set[int], others: list[int], count: int) -> None:
    taken: list[tuple[int, ...]] = []
    for other in others:
        taken.append(choose_cores(host, taken, other))
    mine = choose_cores(host, taken, count)
    assert len(mine) == count
    assert set(mine) <= host


@given(hosts, counts)
def test_sets_are_disjoint_while_cores_last(host: set[int], wanted: list[int]) -> None:
    taken: list[tuple[int, ...]] = []
    for count in wanted:
        free = host - {core for cores in taken for core in cores}
        mine = choose_cores(host, taken, count)
        if free:
            assert set(mine) <= free
            assert len(set(mine)) == min(count, len(free))
        taken.append(mine)


@given(hosts, counts)
def test_cores_that_must_be_shared_are_shared_evenly(host: set[int], wanted: list[int]) -> None:
    taken = [tuple(host)] * 2 + [choose_cores(host, [tuple(host)] * 2, count) for count in wanted[:1]]
    mine = choose_cores(host, taken, 1)
    load = {core: sum(core in cores for cores in taken) for core in host}
    assert load[mine[0]] == min(load.values())


def test_known_cases() -> None:
    assert choose_cores([0, 1, 2, 3], [], 2) == (0, 1)
    assert choose_cores([0, 1, 2, 3], [(0, 1)], 2) == (2, 3)
    assert choose_cores([0, 1], [], 4) == (0, 1, 0, 1)
    assert choose_cores([0, 1, 2], [(0, 1)], 4) == (2, 2, 2, 2)
    assert choose_cores([0, 1], [(0, 0, 0), (1,)], 2) == (0, 1)


def test_cores_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.vm.pinning.os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    cores = Cores()
    with cores.share(2) as first, cores.hold((2,)):
        assert first == (0, 1)
        with cores.share(1) as second:
            assert second == (3,)
        with cores.share(1) as third:
            assert third == (3,)
    with cores.share(4) as all_of_them:
        assert all_of_them == (0, 1, 2, 3)
