"""What QEMU and guests print, read by us: consoles, `-cpu help`, `info usernet`, warnings; and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import PortTakenError
from offloadd.vm.console import clean, console_tail
from offloadd.vm.instance import missing_features
from offloadd.vm.ports import parse_usernet
from offloadd.vm.qemu import parse_cpu_help
from offloadd.vm.record import InstanceRecord, read_record, read_records, write_record

from .plans import plan


@pytest.mark.parametrize(
    ("dirty", "shown"),
    [
        ("plain\ttext\r\nnext", "plain\ttext\nnext"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[H\x1bcwiped", "wiped"),
        ("\x1b]0;a title\x07text", "text"),
        ("\x1b]52;c;YQ==\x1b\\text", "text"),
        ("over\rwritten", "overwritten"),
        ("\x9b31mtext\x00\x08\x7f", "31mtext"),
        ("\x1b", ""),
    ],
)
def test_what_a_terminal_may_see_of_a_console(dirty: str, shown: str) -> None:
    assert clean(dirty) == shown


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    assert not [
        character for character in clean(text) if character not in "\n\t" and (character < " " or "\x7f" <= character < "\xa0")
    ]


def test_the_last_lines_of_a_console(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    assert console_tail(log) == ""
    log.write_bytes(b"".join(b"line %d  \r\n\r\n" % number for number in range(5000)) + b"\xff\x1b[0mlogin: ")
    assert console_tail(log, 3) == "line 4998\nline 4999\n\N{REPLACEMENT CHARACTER}login:"


X86_HELP = """\
Available CPUs:
x86 486                   (alias configured by machine type)
x86 Haswell-noTSX-IBRS    (alias of Haswell-v4)
x86 Skylake-Client        (alias configured by machine type)
x86 max                   Enables all features supported by the accelerator in the current host

Recognized CPUID flags:
  3dnow 3dnowext 3dnowprefetch
  abm
"""
X86_HELP_10 = """\
Available CPUs:
  486                   (alias configured by machine type)
  Haswell-noTSX-IBRS    (alias of Haswell-v4)
  Skylake-Client        (alias configured by machine type)
  max                   Enables all features supported by the accelerator in the current host

Recognized CPUID flags:
  3dnow abm
"""
ARM_HELP = """\
Available CPUs:
  a64fx
  cortex-a57
  max
"""
PPC_HELP = """\
PowerPC 601_v1           PVR 00010001
PowerPC 601              (alias for 601_v1)
PowerPC power9_v2.0      PVR 004e1200
PowerPC power9           (alias for power9_v2.0)
"""
S390_HELP = """\
s390 gen15a          (alias for gen15a-base) IBM z15 T01 GA1         (static, migration-safe)
s390 z900.2          IBM zSeries 900 GA2                              (migration-safe)

Recognized feature flags:
type                 : fixed-ish
Recognized feature groups:
aen                  : available
"""


@pytest.mark.parametrize(
    ("text", "models"),
    [
        (X86_HELP, {"486", "Haswell-noTSX-IBRS", "Skylake-Client", "max"}),
        (X86_HELP_10, {"486", "Haswell-noTSX-IBRS", "Skylake-Client", "max"}),
        (ARM_HELP, {"a64fx", "cortex-a57", "max"}),
        (PPC_HELP, {"601_v1", "601", "power9_v2.0", "power9"}),
        (S390_HELP, {"gen15a", "z900.2"}),
        ("", set()),
    ],
)
def test_the_models_that_a_qemu_knows(text: str, models: set[str]) -> None:
    assert parse_cpu_help(text) == models


USERNET = """\
Hub -1 (net0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[ESTABLISHED]   30       127.0.0.1 45678       10.0.2.15    22     0     0
  TCP[HOST_FORWARD]  14       127.0.0.1 34567       10.0.2.15    80     0     0
  TCP[HOST_FORWARD]  13       127.0.0.1 11022       10.0.2.15    22     0     0
  UDP[236 sec]       15       10.0.2.15    68        10.0.2.2    67     0     0
"""


def test_the_ports_that_qemu_has_chosen() -> None:
    assert parse_usernet(USERNET) == {22: 11022, 80: 34567}
    assert parse_usernet("") == {}


def test_features_that_the_accelerator_does_not_give() -> None:
    warning = "qemu-system-x86_64: warning: TCG doesn't support requested feature: CPUID.01H:ECX.pcid [bit 17]\n"
    other = "qemu-system-x86_64: warning: TCG doesn't support requested feature: CPUID.07H:EBX.invpcid [bit 10]\n"
    assert missing_features(warning + other + warning + "another warning\n") == ("pcid", "invpcid")


def record(name: str, **changes: Any) -> InstanceRecord:
    values: dict[str, Any] = {
        "plan": plan(name),
        "pid": 1,
        "started": 2,
        "ports": {22: 11022},
        "cores": (0, 1),
        "missing_features": ("pcid",),
        "purpose": "machine",
        "clock_offset": 1000.25,
        "began": 1.5,
    }
    return InstanceRecord(**values | changes)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m/instance.json"
    path.parent.mkdir()
    write_record(path, record("m"))
    assert read_record(path) == record("m")
    assert [file.name for file in path.parent.iterdir()] == ["instance.json"]


def test_a_guests_clock_follows_the_one_of_the_host_that_nobody_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.vm.record.time.time", lambda: pytest.fail("somebody may set it"))
    monkeypatch.setattr("offloadd.vm.record.time.monotonic", lambda: 50.5)
    assert record("m").clock() == 1050.75


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff", b'{"pid": 1}'])
def test_what_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "a/instance.json").write_bytes(content)
    write_record(tmp_path / "b/instance.json", record("b"))
    assert read_record(tmp_path / "a/instance.json") is None
    assert read_record(tmp_path / "c/instance.json") is None
    assert [found.plan.instance for found in read_records(tmp_path)] == ["b"]


def test_a_taken_port_is_worth_another_try() -> None:
    assert PortTakenError.retryable
    assert PortTakenError.exit_status == 75
