"""The top of debian/changelog."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.builder.changelog import top_entry

CHANGELOG = """\
mbedtls (2.28.3-1) unstable; urgency=medium

  * New upstream release.
    - a line with -- in it

 -- Andrea Pappacoda <andrea@example.org>  Wed, 29 Mar 2023 21:39:41 +0200

mbedtls (2.28.2-1) unstable; urgency=medium

 -- Somebody <x@example.org>  Wed, 04 Jan 2023 00:00:00 +0100
"""


def test_newest_entry() -> None:
    entry = top_entry(CHANGELOG.encode())
    assert entry is not None
    assert (entry.source, entry.version) == ("mbedtls", "2.28.3-1")
    assert entry.date == datetime(2023, 3, 29, 19, 39, 41, tzinfo=UTC)
    assert entry.date.tzinfo is UTC


def test_blank_lines_and_other_bytes_before_the_end() -> None:
    entry = top_entry(b"\n\n" + CHANGELOG.replace("New", "N\xe9w").encode("latin-1"))
    assert entry is not None
    assert entry.version == "2.28.3-1"


@pytest.mark.parametrize("zone", ["-0000", ""])
def test_no_zone_is_utc(zone: str) -> None:
    entry = top_entry(CHANGELOG.replace("+0200", zone).encode())
    assert entry is not None
    assert entry.date == datetime(2023, 3, 29, 21, 39, 41, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# a comment",
        "mbedtls unstable",
        CHANGELOG.split(" --")[0],
        CHANGELOG.replace(" -- Andrea", "  Andrea"),
        CHANGELOG.replace("29 Mar 2023", "yesterday").replace("04 Jan 2023", "never"),
        CHANGELOG.replace("29 Mar 2023", "99 Mar 2023"),
        CHANGELOG.replace("2023", "99999999999999"),
    ],
)
def test_no_entry(text: str) -> None:
    assert top_entry(text.encode()) is None


def test_only_the_beginning_is_read() -> None:
    assert top_entry(b"x (1) y; z\n" + b"\n" * 1_000_000 + CHANGELOG.encode()) is None


DATED = st.text(max_size=40).map(lambda text: CHANGELOG.replace("29 Mar 2023", text).encode("utf-8", "replace"))


@given(st.binary(max_size=300) | DATED)
def test_any_input_is_taken(data: bytes) -> None:
    entry = top_entry(data)
    assert entry is None or entry.date.tzinfo is UTC
