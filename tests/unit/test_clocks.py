"""How clocks look to a person."""

from __future__ import annotations

from typing import Any

from offload_cli.clocks import clocks_page

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
LOCAL: dict[str, Any] = {
    "name": "local",
    "kind": "local",
    "mode": "online",
    "state": None,
    "date": None,
    "now": NOW,
    "expected": NOW,
    "clock": NOW,
    "off_s": None,
    "load": None,
    "fault": "",
}
OLD = 1_577_836_875.0  # 2020-01-01T00:01:15Z
VM = {
    **LOCAL,
    "name": "vm",
    "kind": "build-vm",
    "state": "running",
    "date": "2020-01-01T00:00:00Z",
    "expected": OLD,
    "clock": OLD - 0.3,
    "off_s": -0.3,
    "load": 0.25,
}
STOPPED = {**VM, "state": "stopped", "expected": None, "clock": None, "off_s": None, "load": None}
FAR = {**LOCAL, "name": "far", "kind": "ssh", "clock": NOW + 3, "off_s": 3.0, "load": 0.5}


def row_of(row: dict[str, Any]) -> str:
    return " ".join(clocks_page([row]).splitlines()[1].split())


def notes_of(row: dict[str, Any]) -> str:
    return "\n".join(clocks_page([row]).splitlines()[3:])


def test_a_shifted_clock_is_shifted_on_purpose() -> None:
    assert row_of(VM) == "vm build-vm running 0.25 2020-01-01T00:01:14Z <1s shifted on purpose by -7y"
    assert notes_of(VM) == ""
    assert row_of(STOPPED).endswith("stopped - - - will start at 2020-01-01T00:00:00Z, shifted on purpose by -7y")
    assert row_of({**STOPPED, "date": None}).endswith("stopped - - - will be as the host's")


def test_clocks_that_are_the_hosts() -> None:
    assert row_of(LOCAL) == "local local ready - 2027-01-15T08:00:00Z - the host's"
    assert row_of(FAR) == "far ssh ready 0.50 2027-01-15T08:00:03Z 3.0s ahead as the host's"
    assert notes_of(FAR) == ""


def test_one_that_is_wrong_is_not_shifted_on_purpose() -> None:
    """Also in a machine whose clock is shifted: what counts is the difference to what it should be."""
    for row in (FAR, VM):
        wrong = {**row, "off_s": -4000.0, "clock": row["expected"] - 4000}
        assert "1h06m behind" in row_of(wrong)
        assert notes_of(wrong).startswith(f"{row['name']}: its clock is 1h06m behind, and not on purpose")


def test_one_that_does_not_answer() -> None:
    silent = {**FAR, "clock": None, "off_s": None, "load": None, "fault": "does not\x1b[2J answer"}
    assert row_of(silent) == "far ssh silent - - - as the host's"
    assert notes_of(silent) == "far: does not answer"
    offline = {**silent, "mode": "offline", "expected": None, "fault": ""}
    assert row_of(offline) == "far ssh offline - - - not asked"


def test_a_narrow_terminal() -> None:
    head = clocks_page([VM, FAR], 60).splitlines()[0].split()
    assert "KIND" not in head
    assert {"NAME", "CLOCK", "WHY"} <= set(head)
