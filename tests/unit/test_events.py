"""The file of a build's events."""

from __future__ import annotations

import json
from pathlib import Path

from offloadd.daemon.events import PIECE, EventLog


def test_what_is_no_text_does_not_end_the_daemon(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events")
    # As file names that are not UTF-8 come out of the operating system's errors.
    events.append("error", what="cannot read caf\udce9")
    events.close()
    assert json.loads((tmp_path / "events").read_text()) == {"event": "error", "what": "cannot read caf?"}


def test_half_a_line_is_dropped_before_the_next_is_written(tmp_path: Path) -> None:
    """As a host leaves it that has lost its power."""
    path = tmp_path / "events"
    path.write_bytes(b'{"event": "log", "text": "x"}\n{"event": "lo')
    events = EventLog(path)
    events.append("end")
    events.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["log", "end"]
    path.write_bytes(b'{"ev')
    EventLog(path).close()
    assert path.read_bytes() == b""
    whole = b'{"event": "log", "text": "' + b"x" * 3 * PIECE + b'"}\n'
    path.write_bytes(whole + whole[: 2 * PIECE])
    EventLog(path).close()
    assert path.read_bytes() == whole
