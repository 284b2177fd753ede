"""What a build is, whichever way it is run: the job, the report on it, and who listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from offloadd.builder.bulk import NO_DISKS, Bulk, DataChannel

DEFAULT_TIMEOUT_S = 24 * 3600.0
DEFAULT_MAX_SILENT_S = 3600.0
"""Both are guix-daemon's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the guest is to do, and within which limits."""

    build: str
    name: str
    """The name of the build directory: NAME-VERSION."""
    steps: tuple[str, ...]
    env: dict[str, str]
    outputs: tuple[str, ...]
    source: Path
    """A tar; its times are not later than the guest's clock."""
    bulk: Bulk = NO_DISKS
    """The disks that were plugged in for it."""
    environment: str | None
    """The serial of the environment's disk, or the absolute path of its unpacked root; None: what the guest has of its own."""
    personality: str | None = None
    """`linux32`: uname names the 32-bit machine, for builds in a 32-bit environment on a 64-bit kernel."""
    network: bool = False
    """Whether the steps have the guest's network, and not a loopback device alone."""
    set_clock: int | None
    """Seconds since 1970 to which the guest's clock is set right before the first step; None leaves it alone."""
    expected_clock: Callable[[], float]
    """What the guest's clock should show now."""
    timeout_s: float
    max_silent_s: float
    keep_failed: bool


@dataclass(kw_only=True)
class Report:
    """What the guest said about the build.  `started` is empty when it did not get that far."""

    started: dict[str, Any]
    clock_start: float | None = None
    """The guest's clock right before the first step, in seconds since 1970."""
    clock_end: float | None = None
    """The same after the last step."""
    clock_drift_s: float = 0.0
    """How far that was from what it should have been."""
    exit_status: int = 0
    failed_step: int = 0
    missing_outputs: tuple[str, ...] = ()
    outputs_channel: DataChannel = "frames"
    duration_s: float = 0.0


class Listener(Protocol):
    """Who is told what happens in a build (the build's event log)."""

    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def log(self, text: str) -> None: ...
    def collecting(self) -> None: ...
