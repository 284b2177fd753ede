"""When a machine that fails is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.breaker import FAILURES, LONGEST_PAUSE_S, Breaker

NOW = 1_700_000_000.0
TIMES = st.floats(min_value=0, max_value=1e10)


def after(failures: int, now: float = NOW) -> Breaker:
    """After so many failures, each at the moment at which the machine may be tried again."""
    breaker = Breaker()
    for _ in range(failures):
        now = max(now, breaker.open_until)
        breaker = breaker.after_failure(now)
    return breaker


def test_two_failures_are_no_reason() -> None:
    assert Breaker().state(NOW) == "closed"
    assert [after(count).state(NOW) for count in (1, 2)] == ["closed", "closed"]
    assert after(2).open_until == 0


def test_the_third_opens_it_for_a_minute_then_one_may_try() -> None:
    breaker = after(3)
    assert breaker == Breaker(3, NOW + 60)
    assert [breaker.state(NOW + s) for s in (0, 59.9, 60, 1e6)] == ["open", "open", "half-open", "half-open"]


@pytest.mark.parametrize(
    ("failures", "pause_s"), [(3, 60), (4, 120), (5, 240), (6, 480), (7, 960), (8, 1920), (9, 3600), (10, 3600)]
)
def test_each_failed_trial_doubles_the_pause_up_to_an_hour(failures: int, pause_s: float) -> None:
    before = after(failures - 1)
    now = max(NOW, before.open_until)
    assert before.after_failure(now).open_until == now + pause_s


def test_a_pause_can_grow_for_ever() -> None:
    assert Breaker(100_000, NOW).after_failure(NOW) == Breaker(100_001, NOW + LONGEST_PAUSE_S)


def test_builds_that_die_with_the_machine_count_as_one() -> None:
    opened = after(3)
    assert opened.after_failure(NOW).after_failure(NOW + 1) == opened


def test_one_success_closes_it() -> None:
    assert after(8).after_success() == Breaker()
    assert after(2).after_success().after_failure(NOW).state(NOW) == "closed"


def test_a_clock_that_was_wrong_does_not_open_it_for_years() -> None:
    breaker = after(3, now=NOW + 30 * 365 * 86400)
    assert breaker.state(NOW) == "half-open"
    assert breaker.after_failure(NOW) == Breaker(4, NOW + 120)


@given(st.lists(st.tuples(st.booleans(), st.floats(min_value=0, max_value=1e5)), max_size=60), TIMES)
def test_it_always_opens_by_failures_and_always_lets_somebody_try_again(steps: list[tuple[bool, float]], now: float) -> None:
    breaker = Breaker()
    row = 0
    for failed, later in steps:
        now += later
        was = breaker.state(now)
        breaker = breaker.after_failure(now) if failed else breaker.after_success()
        row = row + 1 if failed else 0
        assert (breaker.state(now) == "closed") == (row < FAILURES)
        if failed and was == "half-open":
            assert breaker.state(now) == "open"
        assert breaker.state(now + LONGEST_PAUSE_S) != "open"
