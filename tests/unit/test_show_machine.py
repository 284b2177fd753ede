"""How machines look to a person."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from offload_cli.show_machine import check_lines, machine_page, machines_page, templates_page

NOW = 1_800_000_000.0
CLOSED = {"state": "closed", "failures": 0, "open_until": None}
LOCAL: dict[str, Any] = {
    "name": "local",
    "kind": "local",
    "systems": ["x86_64-linux", "i686-linux"],
    "missing": {},
    "mode": "online",
    "fault": "",
    "remedy": "",
    "breaker": CLOSED,
    "busy": 1,
    "slots": 2,
    "speed": 1.0,
    "emulation": "none",
    "load": 0.5,
    "overload_threshold": 0.8,
    "memory_mib": 2048,
    "disk_free": 10 << 30,
    "kernel": "6.1.0",
    "features": [],
    "network": False,
    "state": None,
    "since": None,
    "reason": None,
    "ssh_port": None,
}
VM = {**LOCAL, "name": "vm", "kind": "build-vm", "state": "running", "since": NOW - 60, "reason": "", "ssh_port": 11022}
TOWER = {**LOCAL, "name": "tower", "kind": "ssh", "load": None, "disk_free": None, "systems": ["aarch64-linux"]}


def line_of(page: str, name: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"{name} "))


def test_a_row_for_each() -> None:
    page = machines_page([LOCAL, VM, TOWER])
    assert page.splitlines()[0].split() == ["NAME", "KIND", "SYSTEMS", "MODE", "STATE", "SLOTS", "SPEED", "LOAD", "DISK"]
    assert " ".join(line_of(page, "local").split()) == "local local x86_64-linux +1 online ready 1/2 1 0.50 10.0 GiB"
    assert "running" in line_of(page, "vm")
    assert line_of(page, "tower").split()[-2:] == ["-", "-"]
    assert len(page.splitlines()) == 4


def test_an_open_breaker_says_until_when() -> None:
    until = NOW + 300
    page = machines_page([{**TOWER, "breaker": {"state": "open", "failures": 3, "open_until": until}}])
    assert line_of(page, "tower").split()[4:6] == ["breaker", "open"]
    when = f"{datetime.fromtimestamp(until):%H:%M}"
    assert f"\ntower: breaker open until {when} (3 failures): offload machine resume tower" in page
    page = machines_page([{**TOWER, "breaker": {"state": "half-open", "failures": 1, "open_until": until}}])
    assert "tower: breaker half-open: tried with one build (1 failure)" in page


def test_what_is_wrong_stands_below() -> None:
    broken = {**TOWER, "fault": "does not answer: \x1b[2Jrefused\nmore"}
    half = {**LOCAL, "name": "binfmt", "missing": {"i686-linux": "not registered: offload binfmt register i386"}}
    none = {**half, "name": "other", "missing": dict.fromkeys(LOCAL["systems"], "not registered")}
    page = machines_page([broken, half, none])
    assert "unusable" in line_of(page, "tower")
    assert "ready" in line_of(page, "binfmt")
    assert "unusable" in line_of(page, "other")
    assert "x86_64-linux " in line_of(page, "binfmt")
    assert "+1" not in line_of(page, "binfmt")
    notes = page.splitlines()[5:]
    assert notes == [
        "tower: does not answer: refused ...",
        "binfmt: not i686-linux: not registered: offload binfmt register i386",
        "other: not x86_64-linux, i686-linux (offload machine show says why)",
    ]
    assert "\x1b" not in page


def test_nobody_knows_how_an_offline_host_does() -> None:
    assert line_of(machines_page([{**TOWER, "mode": "offline"}]), "tower").split()[3:5] == ["offline", "-"]


def test_a_narrow_terminal_goes_without_some_columns() -> None:
    wide = {**VM, "name": "emulated-powerpc64le", "kind": "emulated-vm", "systems": ["powerpc64le-linux"]}
    for width in (80, 90, 120):
        page = machines_page([wide, {**TOWER, "fault": "word " * 50}], width)
        assert max(map(len, page.splitlines())) <= width
        assert "SLOTS" in page
    assert "SPEED" in page
    assert "SPEED" not in machines_page([wide], 80)


def test_a_page_of_one() -> None:
    machine = {
        **VM,
        "missing": {"i686-linux": "no"},
        "configuration": {
            "kind": "build-vm",
            "name": "vm",
            "features": ["a", "b"],
            "date": None,
            "port-forwardings": {"1": 22},
        },
    }
    lines = machine_page(machine, NOW).splitlines()
    assert lines[0] == "vm"
    for line in (
        "  slots: 1 of 2 busy",
        "  load: 0.50 for each core",
        "  systems: x86_64-linux",
        "    i686-linux: no",
        "    features: [a, b]",
        "    port-forwardings: {1: 22}",
        "  SSH: 127.0.0.1:11022",
    ):
        assert line in lines
    assert not any("date" in line for line in lines)
    assert "  load: 2.00 for each core (overloaded: taken last)" in machine_page({**machine, "load": 2.0}, NOW)


def test_checks() -> None:
    good = {"name": "reach it", "ok": True, "text": "a:22", "took_s": 0.2, "detail": "", "hint": ""}
    assert check_lines(good) == ["  ok      reach it: a:22 (0.2s)"]
    bad = {**good, "ok": False, "text": "no", "took_s": 0.0, "detail": "one\n\x1b[2Jtwo", "hint": "try"}
    assert check_lines(bad) == ["  failed  reach it: no", "          | one", "          | two", "          hint: try"]


def test_templates() -> None:
    template: dict[str, Any] = {
        "digest": "0123456789abcdef" * 4,
        "machine": "vm",
        "image": "debian",
        "cpu": "Haswell",
        "memory_mib": 2048,
        "qemu_version": "7.2.22",
        "accelerator": "tcg",
        "made": "2026-11-01T00:00:00Z",
        "size_on_disk": 150 << 20,
        "in_memory": False,
        "stale": "",
    }
    page = templates_page([template, {**template, "in_memory": True}], NOW)
    heads, *rows = (line.split() for line in page.splitlines())
    assert heads == ["DIGEST", "MACHINE", "IMAGE", "CPU", "MEMORY", "QEMU", "MADE", "SIZE", "STATE"]
    assert rows[0][:6] == ["0123456789ab", "vm", "debian", "Haswell", "2.0", "GiB"]
    assert rows[0][-4:] == ["150.0", "MiB", "on", "disk"]
    assert rows[1][-2:] == ["in", "memory"]
    assert len(rows) == 2
    stale = templates_page([template, {**template, "in_memory": True, "stale": "made from an older image"}], NOW, 80)
    assert max(map(len, stale.splitlines())) <= 80
    assert stale.splitlines()[2].split()[-1] == "stale"
    assert "\n0123456789ab: made from an older image\n" in stale
    assert "offload template gc" in stale
