"""The file of a build's events."""

from __future__ import annotations

import json
from pathlib import Path

from offloadd.daemon.events import EventLog


def test_what_is_no_text_does_not_end_the_daemon(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events")
    # As file names that are not UTF-8 come out of the operating system's errors.
    events.append("error", what="cannot read caf\udce9")
    events.close()
    assert json.loads((tmp_path / "events").read_text()) == {"event": "error", "what": "cannot read caf?"}
