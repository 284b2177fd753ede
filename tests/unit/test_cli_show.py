"""How things look to a person."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offload_cli.result import Result
from offload_cli.show import (
    ago,
    build_summary,
    builds_table,
    cpu,
    fields,
    guest_clock,
    image_text,
    images_table,
    machine_text,
    machines_table,
    pinning,
    shift,
    table,
)

NOW = datetime(2026, 11, 2, tzinfo=UTC)

ROW: dict[str, Any] = {
    "name": "build-vm",
    "kind": "build-vm",
    "state": "running",
    "since": NOW.timestamp() - 60,
    "reason": "",
    "systems": ["x86_64-linux"],
    "image": "debian",
    "date": "2020-01-01T00:00:00Z",
    "cpu": "Haswell",
    "cpu_count": 2,
    "memory_mib": 2048,
    "ssh_port": 11022,
    "private_memory": 147 << 20,
    "guests": [],
}
GUEST: dict[str, Any] = {
    "instance": "build-0a1b2c3d",
    "purpose": "build",
    "pid": 43,
    "since": NOW.timestamp() - 3,
    "date": "2012-06-01T00:00:00Z",
    "cpu": "IvyBridge",
    "cpu_count": 2,
    "memory_mib": 2048,
    "private_memory": 91 << 20,
}
INSTANCE: dict[str, Any] = {
    "pid": 42,
    "accelerator": "tcg",
    "qemu_version": "7.2.22",
    "cpu": "Haswell",
    "missing_cpu_features": ["CPUID.01H:ECX.pcid", "CPUID.07H:EBX.hle"],
    "clock": "2020-01-01T00:03:12Z",
    "cores": [1, 0],
    "private_memory": 147 << 20,
    "ports": {"22": 11022},
    "image_digest": "0123456789abcdef",
}
MACHINE: dict[str, Any] = {
    **ROW,
    "detail": "",
    "configuration": {},
    "instance": INSTANCE,
    "console_log": "/x/console.log",
    "logs": "/x/logs",
}


@pytest.mark.parametrize(
    ("clock", "text"),
    [
        (datetime(2020, 1, 1, tzinfo=UTC), "-6y10m"),
        (datetime(2020, 11, 2, tzinfo=UTC), "-6y"),
        (datetime(2026, 10, 1, tzinfo=UTC), "-1m"),
        (datetime(2026, 11, 5, tzinfo=UTC), "+3d"),
        (datetime(2026, 11, 1, 22, tzinfo=UTC), "-2h00m"),
        (datetime(2027, 11, 1, tzinfo=UTC), "+11m"),
        (datetime(1970, 1, 1, tzinfo=UTC), "-56y10m"),
    ],
)
def test_shift(clock: datetime, text: str) -> None:
    assert shift(clock, NOW) == text


def test_a_clock_of_today_is_not_shifted() -> None:
    assert guest_clock("2026-11-02T00:00:05Z", NOW.timestamp()) == "2026-11-02T00:00:05Z, as the host's"
    assert guest_clock("2020-01-01T00:03:12Z", NOW.timestamp()) == "2020-01-01T00:03:12Z, shifted on purpose by -6y10m"


def test_table_is_aligned_and_one_line_for_each_row() -> None:
    assert table(["A", "LONG"], [["x", "1\n2"], ["yyy", ""]]).splitlines() == ["A    LONG", "x    1 ...", "yyy"]


def test_fields_leave_out_what_is_empty_and_break_long_values() -> None:
    lines = fields([("a", "1"), ("empty", ""), ("words", "word " * 30)])
    assert lines[0] == "  a      1"
    assert len(lines) == 3
    assert all(len(line) < 110 for line in lines)


def test_missing_features() -> None:
    missing = [f"CPUID.01H:ECX.f{index}" for index in range(6)]
    assert cpu("Haswell", [], "kvm") == "Haswell"
    assert cpu("Haswell", missing, "tcg", limit=2) == "Haswell; TCG does not give it f0, f1 and 4 more"
    assert cpu("Haswell", missing[:2], "tcg", limit=2) == "Haswell; TCG does not give it f0, f1"


def test_pinning_and_ages() -> None:
    assert pinning([1, 0]) == "vCPU 0 -> core 1, vCPU 1 -> core 0"
    assert [ago(None, 0), ago(100, 130), ago(1, 1 + 3 * 86400)] == ["-", "30s ago", "3d ago"]


def test_machine_that_runs() -> None:
    text = machine_text(MACHINE, NOW.timestamp())
    assert "clock in the guest  2020-01-01T00:03:12Z, shifted on purpose by -6y10m" in text
    assert "Haswell; TCG does not give it pcid, hle" in text
    assert "vCPU 0 -> core 1, vCPU 1 -> core 0" in text
    assert "127.0.0.1:11022 -> 22" in text
    assert "private memory      147.0 MiB" in text
    hidden = {**MACHINE, "instance": {**INSTANCE, "private_memory": None}}
    assert "private memory" not in machine_text(hidden, NOW.timestamp())


def test_machine_that_crashed_shows_its_last_words_without_control_characters() -> None:
    crashed = {
        **MACHINE,
        "state": "crashed",
        "reason": "the guest's kernel panicked",
        "instance": None,
        "detail": "console:\n\x1b[2Jpanic",
    }
    lines = machine_text({**crashed, "cpu": None}, NOW.timestamp()).splitlines()
    assert lines[-2:] == ["  | console:", "  | panic"]
    assert any("the newest released before that date" in line for line in lines)


def test_lists() -> None:
    assert "running (1m00s ago)" in machines_table([ROW], NOW.timestamp())
    narrow = machines_table([ROW], NOW.timestamp(), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "SSH" in narrow
    assert "today" in machines_table([{**ROW, "date": None}], NOW.timestamp())
    image = {
        "name": "debian",
        "digest": "0" * 64,
        "state": "not built",
        "suite": "bookworm",
        "architecture": "amd64",
        "made": None,
    }
    assert images_table([image], NOW.timestamp()).splitlines()[1].split() == [
        "debian",
        "000000000000",
        "not",
        "built",
        "bookworm",
        "amd64",
        "-",
        "-",
        "-",
    ]


def test_a_disk_file_as_an_image() -> None:
    row = {"name": "guix", "kind": "file", "digest": "", "state": "incomplete", "suite": None, "architecture": None}
    assert images_table([row], NOW.timestamp()).splitlines()[1].split() == [
        *["guix", "-", "incomplete", "a", "disk", "file", "-", "-", "-"]
    ]
    recipe = {"kind": "file", "name": "guix", "path": "guix.raw", "url": None}
    shown = {"name": "guix", "digest": "abc", "state": "ready", "recipe": recipe, "disk": {"format": "raw", "size": 1 << 30}}
    text = image_text(shown, NOW.timestamp())
    assert re.search(r"comes from +guix.raw\n +format +raw\n", text)
    assert re.search(r"disk in the guest +1.0 GiB", text)
    assert "kernel" not in text


def test_guests_stand_below_their_machine() -> None:
    warm = {**GUEST, "instance": "warm-12345678", "purpose": "warm", "private_memory": None}
    saved, tested, booting = (
        {**GUEST, "instance": name, "since": None} for name in ("template-0123456789ab", "test-1234", "build-1")
    )
    rows = [{**ROW, "guests": [GUEST, warm, saved, tested, booting]}, {**ROW, "name": "z", "state": "stopped", "since": None}]
    lines = [" ".join(line.split()) for line in machines_table(rows, NOW.timestamp()).splitlines()]
    assert lines[1].startswith("build-vm build-vm running (1m00s ago)")
    assert lines[1].endswith("2 2.0 GiB 147.0 MiB 11022")
    assert lines[2] == ("- build-0a1b2c3d building 0a1b2c3d (3.0s ago) 2012-06-01T00:00:00Z IvyBridge 2 2.0 GiB 91.0 MiB -")
    assert lines[3] == "- warm-12345678 waiting (3.0s ago) - IvyBridge 2 2.0 GiB - -"
    assert lines[4].startswith("- template-0123456789ab being saved 2012")
    assert lines[5].startswith("- test-1234 being tested 2012")
    assert lines[6].startswith("- build-1 building 1 2012")
    assert lines[7].startswith("z ")
    narrow = machines_table(rows, NOW.timestamp(), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert {"PRIVATE", "SSH"} <= set(narrow.split())


RESULT: dict[str, Any] = {
    "build": "0a1b2c3d",
    "name": "hello",
    "version": "1",
    "machine": "build-vm",
    "instance": "build-0a1b2c3d",
    "boot_s": 9.3,
    "own_vm": True,
    "clock": 1577836800.5,
    "cpu": "Haswell",
    "accelerator": "kvm",
    "qemu": "7.2",
    "duration_s": 12.0,
}


def test_summary_of_a_success() -> None:
    kept = Result(directory=Path("/x/out"), files=2, size=2048, left_out=("a -> /etc",))
    text = "\n".join(build_summary("succeeded", RESULT, kept))
    assert text.startswith("hello 1: succeeded in 12s\n")
    assert "build-vm, booted for it in 9.3s" in text
    assert "2020-01-01T00:00:00Z in the guest" in text
    assert "/x/out (2 files, 2.0 KiB)" in text
    assert "a -> /etc (leads out of the outputs)" in text


@pytest.mark.parametrize(
    ("guest", "words"),
    [
        ({"guest": "boot", "boot_s": 3.1}, "booted for it in 3.1s"),
        ({"guest": "clone", "boot_s": 0.234}, "a fresh clone, ready in 0.2s"),
        ({"guest": "warm", "boot_s": 0.05}, "a fresh clone that was waiting"),
        ({"guest": "kept", "boot_s": 0.0, "own_vm": False}, "kept running"),
        ({"guest": "kept", "boot_s": 1.2, "own_vm": False}, "started in 1.2s and kept running"),
        ({"boot_s": 9.3}, "booted for it in 9.3s"),
        ({"boot_s": None}, "which was running"),
    ],
)
def test_what_guest_a_build_had(guest: dict[str, Any], words: str) -> None:
    assert f"  machine      build-vm, {words}" in build_summary("succeeded", {**RESULT, **guest}, None)


def test_summary_of_what_never_ran() -> None:
    lines = build_summary("errored", {"build": "0a1b2c3d", "name": "hello", "version": "1", "machine": "build-vm"}, None)
    assert lines == ["hello 1: errored", "  build    0a1b2c3d", "  machine  build-vm"]


def test_summary_of_a_failure_that_was_kept() -> None:
    lines = build_summary(
        "failed", {**RESULT, "error": {}, "own_vm": False} | {"error": {"what": "x"}}, Result(directory=Path("/o"), files=1)
    )
    assert "/o/failed (1 file, 0 B)" in lines[-1]
    assert "which was running" in lines[2]


def test_the_last_column_is_broken_to_fit_the_terminal() -> None:
    rows = [["a", "one two three four five six seven eight"], ["b", "/a/path/that/is/longer/than/what/is/left/of/it"]]
    assert table(["A", "WHY"], rows, 34).splitlines() == [
        "A  WHY",
        "a  one two three four five six",
        "   seven eight",
        "b  /a/path/that/is/longer/than/what/is/left/of/it",
    ]
    assert len(table(["A", "WHY"], rows).splitlines()) == 3


def test_builds_on_a_narrow_terminal() -> None:
    row = {
        "build": "0a1b2c3d",
        "name": "hello",
        "version": "2.10-3",
        "state": "succeeded",
        "system": "powerpc64le-linux",
        "machine": "emulated-ppc64le",
        "date": "2020-01-01T00:00:00Z",
        "duration_s": 61.0,
        "created": NOW.timestamp() - 60,
    }
    whole = builds_table([row, {**row, "system": None, "machine": ""}], NOW.timestamp())
    assert whole.split()[:4] == ["BUILD", "NAME", "STATE", "SYSTEM"]
    assert "2020-01-01T00:00:00Z" in whole
    narrow = builds_table([row], NOW.timestamp(), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "powerpc64le-linux" in narrow
