"""Dates, durations and sizes as people write them.

A date is kept in UTC to the second.  What a guest's clock can hold depends on its architecture.
"""

from __future__ import annotations

import re
from calendar import monthrange
from datetime import UTC, date, datetime, timedelta

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)?")
_UNIT_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, None: 1}

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

LAST_MOMENT: dict[str, datetime] = {
    # The MC146818 has two digits for the year, and Linux takes those below 70 for 20xx: with QEMU's pc, which names no century
    # byte to ACPI, a guest told 2070-01-02 comes up at 1970-01-02 (seen with Linux 6.1).
    "x86_64-linux": datetime(2069, 12, 31, 23, 59, 59, tzinfo=UTC),
    # 32-bit time_t in Debian's i386 ends here.
    "i686-linux": datetime(2038, 1, 19, 3, 14, 7, tzinfo=UTC),
    "armhf-linux": datetime(2038, 1, 19, 3, 14, 7, tzinfo=UTC),
    # ARM PL031: an unsigned 32-bit count of seconds (ARM DDI 0224).
    "aarch64-linux": datetime(2106, 2, 7, 6, 28, 15, tzinfo=UTC),
    # Goldfish RTC: a signed 64-bit count of nanoseconds.
    "riscv64-linux": datetime(2262, 4, 11, 23, 47, 16, tzinfo=UTC),
}
_LAST_ELSEWHERE = datetime(2038, 1, 19, 3, 14, 7, tzinfo=UTC)


_DATE_HINT = "write 2020-01-01, 2020-01-01T12:00:00Z, @1577836800, 2 years ago or now"
_AGO = re.compile(r"(\d+)\s+(second|minute|hour|day|week|month|year)s?\s+ago")
_AGO_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}


def parse_date(text: object, *, more: str = "") -> datetime:
    """`2020-01-01`, `2020-01-01T12:00[:00][Z|+01:00]`, `@SECONDS`, `2 years ago` or `now` as a date in UTC.

    Args:
        more: what else may be written in this place, for the message.
    Raises:
        ValueError: it is none of these, or before 1970.
    """
    try:
        moment = _moment(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError, OSError):  # also the first or the last day of all, in another time zone
        raise ValueError(f"{text!r} is not a date: {_DATE_HINT}{more}") from None
    if moment < EPOCH:
        raise ValueError(f"{moment:%Y-%m-%d} is before 1970, where a machine's clock starts")
    return moment.replace(microsecond=0)


def _moment(value: object) -> datetime:
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    if not isinstance(value, str):
        raise ValueError
    text = value.strip()
    if text in ("now", "today"):
        return datetime.now(UTC)
    if match := _AGO.fullmatch(text):
        return _ago(int(match[1]), match[2])
    if text.startswith("@"):
        return datetime.fromtimestamp(int(text[1:]), UTC)
    return datetime.fromisoformat(text)


def _ago(count: int, unit: str) -> datetime:
    """Months and years are the calendar's; a day that the month does not have becomes its last."""
    now = datetime.now(UTC)
    if unit in _AGO_S:
        return now - timedelta(seconds=count * _AGO_S[unit])
    month = now.year * 12 + now.month - 1 - count * (12 if unit == "year" else 1)
    year, month = month // 12, month % 12 + 1
    return now.replace(year=year, month=month, day=min(now.day, monthrange(year, month)[1]))


def check_clock_holds(moment: datetime, system: str) -> None:
    """Raise ValueError when the clock of a machine of type `system` cannot show `moment`."""
    last = LAST_MOMENT.get(system, _LAST_ELSEWHERE)
    if not EPOCH <= moment <= last:
        raise ValueError(f"{moment:%Y-%m-%d} is outside what the clock of {system} holds (1970-01-01 to {last:%Y-%m-%d})")


def format_date(moment: datetime) -> str:
    """`2020-01-01T00:00:00Z`: the one way in which dates are written out."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_duration(text: str | int | float) -> float:
    """`90`, `10m`, `2h`, `1h30m`, `500ms` in seconds.

    Raises:
        ValueError: it is none of these, or not more than zero.
    """
    if isinstance(text, bool):
        raise ValueError("not a duration: write 90, 10m, 2h or 1h30m")
    rest = str(text).strip()
    total, at = 0.0, 0
    while at < len(rest):
        match = _DURATION.match(rest, at)
        if match is None:
            raise ValueError(f"{text!r} is not a duration: write 90, 10m, 2h or 1h30m")
        total += float(match[1]) * _UNIT_S[match[2]]
        at = match.end()
    if not 0 < total < float("inf"):
        raise ValueError(f"{text!r} is not a duration: it must be more than zero, and a clock must hold it")
    return total


def format_duration(seconds: float) -> str:
    """`0.4s`, `42s`, `3m05s`, `2h00m`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


_SIZE = re.compile(r"(\d+)\s*(?:([KMGT])(?:i?B)?)?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """`4G`, `512MiB`, `1048576` in bytes; the units are powers of 1024.

    Raises:
        ValueError: it is none of these.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size: write 4G or 512M")
    power = " KMGT".index(match[2].upper()) if match[2] else 0
    return int(match[1]) << (10 * power)


def format_size(size: float) -> str:
    """`1.4 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
