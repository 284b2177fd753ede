"""Which paused clones are kept, given up and made."""

from __future__ import annotations

from typing import Any

import pytest

from offloadd.daemon.host_memory import HostMemory
from offloadd.daemon.keeping import CALM_S, IDLE_S, PRESSURE_LIMIT, RECOVERY_S, Facts, Idle, Kind, Verdict, Want, judge_pool

NOW = 10_000.0
GIB = 1 << 30


def memory(available: float = 8 * GIB, pressure: float | None = 0.0) -> HostMemory:
    return HostMemory(total=16 * GIB, available=int(available), pressure=pressure)


def want(
    machine: str = "m",
    digest: str = "t",
    count: int = 1,
    used: float = NOW - 10,
    memory_mib: int = 2048,
    kind: Kind = "warm",
) -> Want:
    return Want(machine=machine, kind=kind, digest=digest, count=count, used=used, memory_mib=memory_mib)


def idle(name: str, machine: str = "m", digest: str = "t", since: float = NOW - 5, kind: Kind = "warm") -> Idle:
    return Idle(name=name, machine=machine, kind=kind, digest=digest, since=since)


def judge(**given: Any) -> Verdict:
    facts: dict[str, Any] = {
        "now": NOW,
        "memory": memory(),
        "idle": [],
        "wants": [want()],
        "last_move": float("-inf"),
        "last_short": float("-inf"),
        "making": False,
    }
    return judge_pool(Facts(**facts | given))


def test_one_is_made_until_there_are_enough() -> None:
    two = [want(count=2)]
    assert judge(wants=[]).make is None
    assert judge(wants=two).make == two[0]
    assert judge(wants=two, idle=[idle("a")]).make == two[0]
    assert judge(wants=two, idle=[idle("a"), idle("b")]).make is None
    assert judge(wants=two, idle=[idle("a"), idle("b")]).give_up == []


def test_one_at_a_time_and_not_while_a_build_begins() -> None:
    assert judge(making=True).make is None
    assert judge(last_move=NOW - CALM_S / 2).make is None
    assert judge(last_move=NOW - CALM_S * 2).make is not None


def test_one_that_is_only_started_is_made_at_any_time() -> None:
    both = [want(kind="started"), want(kind="warm")]
    assert judge(wants=both, last_move=NOW).make == both[0]
    assert judge(wants=both, last_move=NOW, idle=[idle("a", kind="started")]).make is None
    # One kind is not taken for the other.
    assert judge(wants=both, idle=[idle("a", kind="started")]).make == both[1]
    assert judge(wants=both, idle=[idle("a", kind="warm")]).make == both[0]
    assert judge(wants=both, idle=[idle("a", kind="started"), idle("b")]).make is None
    assert judge(wants=both, making=True).make is None


def test_what_is_started_goes_as_the_others_do() -> None:
    started, one = want(kind="started"), idle("a", kind="started")
    assert judge(wants=[started], idle=[one]).give_up == []
    assert judge(wants=[started], idle=[one], memory=memory(pressure=50.0)).give_up == ["a"]
    assert judge(wants=[want(digest="new", kind="started")], idle=[one]).give_up == ["a"]
    assert judge(wants=[want(kind="started", used=NOW - IDLE_S)], idle=[one]).give_up == ["a"]
    # Whatever the guest's memory, it costs little.
    assert judge(wants=[want(kind="started", memory_mib=1 << 20)], memory=memory(4.07 * GIB)).make is not None
    assert judge(wants=[want(kind="started")], memory=memory(4.06 * GIB)).make is None


def test_the_machine_that_was_used_last_comes_first() -> None:
    wants = [want("old", used=NOW - 30), want("new", used=NOW - 20)]
    assert judge(wants=wants).make == wants[1]
    assert judge(wants=wants, idle=[idle("a", "new")]).make == wants[0]


def test_a_template_that_has_failed_is_left_alone_for_a_while() -> None:
    assert judge(failed={"t"}).make is None
    assert judge(failed={"another"}).make is not None


def test_what_nobody_wants_any_more_is_given_up_at_once() -> None:
    # Builds of another date want another CPU, and so another template.
    verdict = judge(wants=[want(digest="new")], idle=[idle("a", digest="old"), idle("b", digest="old")])
    assert sorted(verdict.give_up) == ["a", "b"]
    assert verdict.make is not None
    # Another machine may want the same template.
    assert list(judge(wants=[want("m")], idle=[idle("a", "other")]).give_up) == ["a"]


def test_of_too_many_the_oldest_are_given_up() -> None:
    found = [idle("young", since=NOW - 1), idle("old", since=NOW - 9), idle("middle", since=NOW - 5)]
    assert list(judge(idle=found).give_up) == ["old", "middle"]


def test_after_ten_minutes_without_a_build_all_are_given_up() -> None:
    long_ago = [want(used=NOW - IDLE_S, count=2)]
    verdict = judge(wants=long_ago, idle=[idle("a"), idle("b")])
    assert sorted(verdict.give_up) == ["a", "b"]
    assert verdict.make is None
    assert judge(wants=[want(used=NOW - IDLE_S + 1)], idle=[idle("a")]).give_up == []


@pytest.mark.parametrize(
    ("found", "short"),
    [
        (memory(pressure=PRESSURE_LIMIT + 0.1), True),
        (memory(pressure=PRESSURE_LIMIT), False),
        # A kernel that measures the pressure knows better than a number of bytes.
        (memory(1 * GIB, pressure=0.0), False),
        (memory(1 * GIB, pressure=None), True),
        (memory(1.7 * GIB, pressure=None), False),
        (HostMemory(total=0, available=0, pressure=None), False),
    ],
)
def test_when_memory_is_short(found: HostMemory, short: bool) -> None:
    verdict = judge(memory=found, idle=[idle("young", since=NOW - 1), idle("old", since=NOW - 9)], wants=[want(count=3)])
    assert verdict.short is short
    assert list(verdict.give_up) == (["old"] if short else [])


def test_none_is_made_while_memory_is_short_nor_right_after() -> None:
    assert judge(memory=memory(pressure=50.0)).make is None
    assert judge(last_short=NOW - RECOVERY_S / 2).make is None
    assert judge(last_short=NOW - RECOVERY_S * 2).make is not None


def test_one_is_made_only_when_it_leaves_a_quarter() -> None:
    # An eighth of the guest's memory is counted, at least 128 MiB.
    assert judge(memory=memory(4.24 * GIB), wants=[want(memory_mib=2048)]).make is None
    assert judge(memory=memory(4.26 * GIB), wants=[want(memory_mib=2048)]).make is not None
    assert judge(memory=memory(4.12 * GIB), wants=[want(memory_mib=128)]).make is None
    assert judge(memory=memory(4.13 * GIB), wants=[want(memory_mib=128)]).make is not None
    # A large one is no reason against a small one.
    small = want("small", memory_mib=512, used=NOW - 50)
    assert judge(memory=memory(4.3 * GIB), wants=[want("large", memory_mib=8192), small]).make == small
    assert judge(memory=HostMemory(total=0, available=0, pressure=None)).make is None


def test_templates_leave_the_memory_after_the_clones() -> None:
    assert judge().unload_s == IDLE_S
    assert judge(memory=memory(pressure=50.0), idle=[idle("a")]).unload_s == IDLE_S
    assert judge(memory=memory(pressure=50.0)).unload_s == 0
