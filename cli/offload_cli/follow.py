"""The events of a build as they come: phases and steps on standard error, the log where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from offload_cli.phases import Phases
from offload_cli.terminal import Log
from offloadd.errors import DaemonError


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a build ended."""

    state: str
    exit_status: int
    """Of the command line."""
    result: dict[str, Any]
    """What becomes build.json."""


def follow(events: Iterable[Mapping[str, Any]], phases: Phases, log: Log) -> Ended:
    """Show the events until the last one.

    Raises:
        DaemonError: there is no last one: the daemon went away.
    """
    try:
        for event in events:
            match event.get("event"):
                case "phase":
                    log.end()
                    phases.tell(str(event["text"]), event.get("fraction"))
                case "state" if event.get("state") == "collecting":
                    log.end()
                    phases.tell("collecting the outputs", None)
                case "step":
                    log.end()
                    phases.line(f"[{event['index']}/{event['count']}] {event['command']}")
                case "log":
                    phases.pause()
                    log.write(str(event["text"]))
                case "end":
                    return Ended(state=str(event["state"]), exit_status=int(event["exit_status"]), result=dict(event["result"]))
    finally:
        phases.pause()
        log.end()
    raise DaemonError("ended during the build", subject="offloadd", hint="offload daemon status; then build again")
