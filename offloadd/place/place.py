"""What all places have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from offloadd.builder.bulk import Disks
from offloadd.builder.job import Job, Listener, Report
from offloadd.builder.outputs import OutputsReceiver

Run = Callable[[Job, OutputsReceiver, Listener], Awaitable[Report]]
"""Runs one job, as `offloadd.builder.run.run_build` does."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place that is ready for one build."""

    run: Run
    environment: str | None = None
    """The environment as the build service knows it: a disk's serial, a directory, None for what the place has of its own."""
    clock: Callable[[], float]
    """What its clock should show now, in seconds since 1970."""
    set_clock: bool = False
    """Whether the clock is this build's alone, so that it is set to that right before the first step."""
    disks: Disks | None = None
    """Where disks for this build can be plugged in; None: everything goes in frames."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the build's record says of it."""
