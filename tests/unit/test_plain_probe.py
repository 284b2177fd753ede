"""What a guest without Python says of itself."""

from __future__ import annotations

import pytest

from offloadd.errors import ProtocolError
from offloadd.place.plain_probe import parse_plain

NOW = 1_600_000_000.0
HURD = """\
Last login: yesterday
== load
1.03 1.00 0.90 1/57 0
== cores
1
== memory
MemTotal:     2096512 kB
MemFree:      1500160 kB
== disk
Filesystem     1024-blocks    Used Available Capacity Mounted on
-                  4915264 1867708   2777876      41% /
== kernel
GNU 0.9
== machine
i686-AT386
== time
1600000003
"""


def test_a_hurd() -> None:
    probe = parse_plain(HURD.encode(), NOW, "childhurd")
    assert (probe.load, probe.cores, probe.memory_mib, probe.disk_free) == (1.03, 1, 1465, 2777876 << 10)
    assert (probe.kernel, probe.machine, probe.clock_offset_s, probe.fault) == ("GNU 0.9", "i686-AT386", 3.5, "")


def test_what_is_available_comes_before_what_is_free() -> None:
    said = HURD.replace("MemFree:", "MemAvailable: 4096 kB\nMemFree:")
    assert parse_plain(said.encode(), NOW, "childhurd").memory_mib == 4


@pytest.mark.parametrize(
    ("line", "load"),
    [
        (" 12:03:37 up 1 day,  3:07,  1 user,  load average: 2.50, 1.20, 1.00", 2.5),
        ("12:03  up 2 mins, load averages: 0.25 0.2 0.1", 0.25),
        ("sh: uptime: not found", None),
        ("", None),
        ("nan inf -1", None),
        ("1e400 2 3", None),
        ("99999999999999.0 1 1", None),
    ],
)
def test_the_load(line: str, load: float | None) -> None:
    said = HURD.replace("1.03 1.00 0.90 1/57 0", line)
    assert parse_plain(said.encode(), NOW, "childhurd").load == load
    two = parse_plain(said.replace("== cores\n1", "== cores\n2").encode(), NOW, "childhurd")
    assert two.load == (None if load is None else load / 2)


@pytest.mark.parametrize("moment", ["", "now", "-5", "1e9", "9" * 12, "9" * 5000, "\u0661", "1 2", "\x1b[2J5"])
def test_a_guest_that_does_not_know_the_time(moment: str) -> None:
    with pytest.raises(ProtocolError, match="does not know what time it is"):
        parse_plain(HURD.replace("1600000003", moment).encode(), NOW, "childhurd")


def test_what_is_missing_or_nonsense_stays_unknown() -> None:
    probe = parse_plain(b"== time\n1600000000\n", NOW, "childhurd")
    assert (probe.load, probe.cores, probe.memory_mib, probe.disk_free, probe.kernel) == (None, 1, None, None, "")
    said = HURD.replace("== cores\n1", "== cores\n-7").replace("1500160 kB", "9" * 40).replace("2777876  ", "x")
    probe = parse_plain(said.encode(), NOW, "childhurd")
    assert (probe.cores, probe.memory_mib, probe.disk_free) == (1, None, None)


def test_what_cannot_be_shown_is_not_kept() -> None:
    said = HURD.encode().replace(b"GNU 0.9", b"\x1b[31mGNU\xff\x07 " + b"x" * 10000)
    kernel = parse_plain(said, NOW, "childhurd").kernel
    assert "\x1b" not in kernel
    assert "\x07" not in kernel
    assert len(kernel) <= 200
