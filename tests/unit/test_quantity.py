"""Dates, durations, sizes and what clocks hold."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from offloadd.model.base import BuildDate
from offloadd.model.quantity import (
    LAST_MOMENT,
    check_clock_holds,
    format_date,
    format_duration,
    format_size,
    parse_date,
    parse_duration,
    parse_size,
)
from offloadd.model.system import SYSTEMS, nearest

NEW_YEAR = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        "2020-01-01",
        " 2020-01-01 ",
        "2020-01-01T00:00",
        "2020-01-01T00:00:00Z",
        "2020-01-01 00:00:00.999999",
        "2020-01-01T01:00:00+01:00",
        "2019-12-31T18:30:00-05:30",
        "@1577836800",
        date(2020, 1, 1),
        datetime(2020, 1, 1),
        datetime(2020, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))),
    ],
)
def test_ways_to_write_a_date(text: object) -> None:
    assert parse_date(text) == NEW_YEAR


def test_now() -> None:
    assert abs(parse_date("now") - datetime.now(UTC)) < timedelta(seconds=5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2020-02-30",
        "01/02/2020",
        "@",
        "@x",
        "@1e9",
        "@" + "9" * 30,
        "2020",
        2020,
        1.5,
        None,
        True,
        b"2020-01-01",
    ],
)
def test_what_is_no_date(text: object) -> None:
    with pytest.raises(ValueError, match="is not a date: write 2020-01-01"):
        parse_date(text)


@pytest.mark.parametrize("text", ["1969-12-31", "1970-01-01T00:00:00+00:01", "@-1", "0001-01-01"])
def test_no_clock_shows_what_was_before_1970(text: str) -> None:
    with pytest.raises(ValueError, match="before 1970"):
        parse_date(text)


@given(st.datetimes(datetime(1970, 1, 2), datetime(9999, 1, 1), timezones=st.timezones()))
def test_a_date_is_read_back_as_it_is_written(moment: datetime) -> None:
    read = parse_date(moment)
    assert parse_date(format_date(read)) == read
    assert read == moment.astimezone(UTC).replace(microsecond=0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_last_moment_of_each_clock(system: str) -> None:
    last = LAST_MOMENT.get(system, datetime(2038, 1, 19, 3, 14, 7, tzinfo=UTC))
    check_clock_holds(datetime(1970, 1, 1, tzinfo=UTC), system)
    check_clock_holds(last, system)
    with pytest.raises(ValueError, match=f"outside what the clock of {system} holds"):
        check_clock_holds(last + timedelta(seconds=1), system)
    with pytest.raises(ValueError, match="1970-01-01 to"):
        check_clock_holds(datetime(1969, 12, 31, tzinfo=UTC), system)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        (90, 90),
        (1.5, 1.5),
        ("10m", 600),
        ("2h", 7200),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("1 d", 86400),
        ("1w", 604800),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", 0, -1, "-5m", "10 minutes", "m", "1h-5m", "inf", "nan", "1e5", True, False, "9" * 400]
)
def test_what_is_no_duration(text: str | float) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4s"), (9.99, "10.0s"), (42.4, "42s"), (59.6, "1m00s"), (185, "3m05s"), (7200, "2h00m"), (90061, "25h01m")],
)
def test_durations_as_text(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), (512, 512), ("4G", 4 << 30), ("4g", 4 << 30), ("512MiB", 512 << 20), ("1 KB", 1024), ("2TiB", 2 << 40)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "4X", "-1", "1.5G", "4 G B", True, "4iB"])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.4 * (1 << 30), "1.4 GiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_as_text(size: float, text: str) -> None:
    assert format_size(size) == text


def test_the_nearest_names() -> None:
    assert nearest("haswell", ["Haswell", "z13", "486"]) == "did you mean Haswell?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", []) == "there is none"


def test_a_build_date_may_be_automatic_and_the_message_says_so() -> None:
    with pytest.raises(ValueError, match=r"2 years ago or now, or auto for"):
        TypeAdapter(BuildDate).validate_python("yesterday")
    assert TypeAdapter(BuildDate).validate_python("auto") == "auto"
    with pytest.raises(ValueError, match=r"2 years ago or now$"):
        parse_date("yesterday")
