"""How fast this host's time stamp counter runs."""

from __future__ import annotations

import os

import pytest

from offloadd.vm.tsc import host_tsc_khz


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="no other processor has one")
def test_it_is_measured_the_same_each_time() -> None:
    measured = [host_tsc_khz.__wrapped__() or 0 for _ in range(3)]
    assert 500_000 <= measured[0] <= 10_000_000
    assert max(measured) - min(measured) <= 2000, "it is rounded to the million, and may lie between two"


def test_other_processors_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6.1", "#1", "aarch64")))
    assert host_tsc_khz.__wrapped__() is None
