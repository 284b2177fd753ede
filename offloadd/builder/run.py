"""One build, wherever it runs: in a guest, on this host, on a remote one.

The build service there is started and spoken to in frames (`offloadd.guest.frames`).  As long as its channel is open the build
has somebody who wants it; when it closes the service ends everything that the build started.  `guest` is here whatever is at
the other end.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import trio

from offloadd.builder.bulk import NO_DISKS, Bulk, DataChannel
from offloadd.builder.outputs import OutputsReceiver
from offloadd.errors import BuildFailedError, BuildTimeoutError, ProtocolError, SshError, TransientError, UsageError
from offloadd.guest.frames import MAX_PAYLOAD, PIECE, Decoder, Frame, encode
from offloadd.model.quantity import format_date, format_duration
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.console import clean

PROTOCOL = 3
PREPARE_S = 900.0
"""For the guest to take the source and to find its disk."""
LAST_WORDS_S = 2.0
"""For what a build service that ended has said."""
CLOCK_TOLERANCE_S = 120.0
"""More than a slow guest needs from its boot to the first step, and less than any time trap minds."""
MAX_LOG_BYTES = 1 << 30
_LEAST_LOG_BYTES = 64
"""What any piece of the log counts for: that much of an event is around each, and a guest may send single bytes."""

DEFAULT_TIMEOUT_S = 24 * 3600.0
DEFAULT_MAX_SILENT_S = 3600.0
"""Both are guix-daemon's."""


class Channel(Protocol):
    """The three standard streams of a build service that runs."""

    async def send(self, data: bytes) -> None:
        """Write to its standard input, waiting while it is slow.

        Raises:
            TransientError: nobody reads any more.
        """

    async def receive(self) -> bytes:
        """Some of its standard output; empty at the end."""

    async def receive_error(self) -> bytes:
        """The same for standard error."""


class BuildService(Protocol):
    """A place where the build service can be started."""

    def open_process(self) -> AbstractAsyncContextManager[Channel]:
        """Start it; leaving the block ends it with all that it started.

        Raises:
            TransientError: it cannot be started.
        """


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


async def run_build(service: BuildService, job: Job, outputs: OutputsReceiver, listener: Listener) -> Report:
    """Run the job; its outputs are in `outputs` afterwards.

    Returns:
        The report, also when a step failed: `exit_status` is not zero then.
    Raises:
        BuildTimeoutError: the build took or was silent for too long.
        BuildFailedError: it succeeded, but outputs are missing or cannot be read; or its log or they are too large.
        ProtocolError: the guest did not keep to the protocol, or shows a wrong clock.
        TransientError: the service cannot be started, or the channel to it broke.
    """
    async with service.open_process() as process:
        session = _Session(process, job, outputs, listener)
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(session.read_errors)
            nursery.start_soon(session.send_source)
            await session.receive()
            nursery.cancel_scope.cancel()
        return session.report


class _Session:
    def __init__(self, process: Channel, job: Job, outputs: OutputsReceiver, listener: Listener) -> None:
        self.report = Report(started={})
        self._process = process
        self._job = job
        self._outputs = outputs
        self._listener = listener
        self._decoder = Decoder()
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._stderr = b""
        self._no_more_errors = trio.Event()
        self._step = 0
        self._log_bytes = 0
        self._began = 0.0
        self._exited = self._complete = self._done = False
        self._limit = trio.CancelScope()
        self._silence = trio.CancelScope()

    async def read_errors(self) -> None:
        while piece := await self._process.receive_error():
            self._stderr = (self._stderr + piece)[-4096:]
        self._no_more_errors.set()

    async def send_source(self) -> None:
        job = self._job
        begin = {
            "protocol": PROTOCOL,
            "build": job.build,
            "environment": job.environment,
            "source": job.bulk.source,
            "scratch": job.bulk.scratch.serial if job.bulk.scratch else None,
            "personality": job.personality,
            "network": job.network,
            "date": job.set_clock,
            "directory": f"/build/{job.name}",
            "steps": job.steps,
            "env": job.env,
            "outputs": job.outputs,
            "keep_failed": job.keep_failed,
        }
        head = json.dumps(begin).encode()
        if len(head) > MAX_PAYLOAD:
            raise UsageError(f"the recipe is larger than {MAX_PAYLOAD >> 10} KiB")
        try:
            await self._process.send(encode(b"B", head))
            if job.bulk.source is None:
                async with await trio.open_file(job.source, "rb") as file:
                    while piece := await file.read(PIECE):
                        await self._process.send(encode(b"S", piece))
                await self._process.send(encode(b"s"))
        except TransientError:
            # A service that closes has said why: whoever receives reads that first.
            await trio.sleep(LAST_WORDS_S)
            raise

    async def receive(self) -> None:
        """Take frames until the guest is done or a limit is reached."""
        self._limit.deadline = trio.current_time() + PREPARE_S
        with self._limit, self._silence:
            while not self._done:
                data = await self._process.receive()
                if not data:
                    with trio.move_on_after(LAST_WORDS_S):
                        await self._no_more_errors.wait()
                    raise self._broken("the build service ended early", error=SshError)
                for frame in self._decoder.feed(data):
                    await self._take(frame)
        if self._done:
            return
        if not self.report.started:
            raise self._broken(f"the guest did not begin the build within {format_duration(PREPARE_S)}", error=SshError)
        if self._silence.cancelled_caught:
            raise BuildTimeoutError(f"no output for {format_duration(self._job.max_silent_s)}", hint="--max-silent-time")
        raise BuildTimeoutError(f"took longer than {format_duration(self._job.timeout_s)}", hint="--timeout")

    async def _take(self, frame: Frame) -> None:
        match frame.kind:
            case b"L":
                self._log(frame.payload)
            case b"E":
                await self._event(frame.json())
            case b"O" if self._exited and self.report.outputs_channel == "frames":
                self._outputs.write(frame.payload)
            case b"o" if self._exited:
                self._outputs.finish()
                self._complete = True
            case b"D" if self._exited:
                self._finish()
            case _:
                raise self._broken(f"the guest sent a frame {frame.kind!r} out of order")

    def _log(self, data: bytes) -> None:
        self._log_bytes += max(len(data), _LEAST_LOG_BYTES)
        if self._log_bytes > MAX_LOG_BYTES:
            raise BuildFailedError(f"the build's log is larger than {MAX_LOG_BYTES >> 20} MiB")
        self._silence.deadline = trio.current_time() + self._job.max_silent_s
        if text := self._text.decode(data):
            self._listener.log(text)

    async def _event(self, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "started" if not self.report.started:
                self._started(event)
            case "step" if self.report.started:
                self._begin_step(_number(event, "index"))
            case "exit" if self.report.started and not self._exited:
                self._exit(event)
            case "outputs" if self._exited:
                self._note_missing(event.get("missing"))
            case "scratch" if self._exited and self._job.bulk.scratch and not self._outputs.size:
                await self._job.bulk.scratch.copy(event.get("size"), self._outputs)
                self.report.outputs_channel = "disk"
            case "error" if self._exited:
                raise self._not_packed(clean(str(event.get("what"))[:1000]))
            case "error":
                raise self._broken(f"the build service: {clean(str(event.get('what'))[:1000])}")
            case other:
                raise self._broken(f"the guest sent the event {repr(other)[:100]} out of order")

    def _started(self, event: dict[str, Any]) -> None:
        clock, expected = _clock(event), self._job.expected_clock()
        if clock is None or abs(clock - expected) > CLOCK_TOLERANCE_S:
            shown = _shown(event.get("clock"))
            raise self._broken(f"the guest's clock shows {shown}, not {_shown(expected)}: the build was not started")
        self.report.started = event
        self.report.clock_start = clock
        self._began = trio.current_time()
        self._limit.deadline = self._began + self._job.timeout_s
        self._silence.deadline = self._began + self._job.max_silent_s
        self._listener.started(self.report)

    def _begin_step(self, index: int) -> None:
        """Our own words for it: a guest could send others, and without end."""
        if index != self._step + 1 or index > len(self._job.steps):
            raise self._broken(f"the guest began step {index} after step {self._step}")
        self._step = index
        self._listener.step(index, len(self._job.steps), self._job.steps[index - 1])

    def _note_missing(self, missing: object) -> None:
        """Only what was asked for can be missing."""
        if not isinstance(missing, list):
            raise self._broken("the guest does not say which outputs are missing")
        self.report.missing_outputs = tuple(pattern for pattern in self._job.outputs if pattern in missing)

    def _exit(self, event: dict[str, Any]) -> None:
        if rest := self._text.decode(b"", final=True):
            self._listener.log(rest)
        self._exited = True
        self._silence.deadline = float("inf")
        self.report.duration_s = trio.current_time() - self._began
        self.report.exit_status = _number(event, "status")
        self.report.failed_step = _number(event, "step") if self.report.exit_status else 0
        self._note_clock(event)
        self._listener.collecting()

    def _note_clock(self, event: dict[str, Any]) -> None:
        """What was built with a wrong clock is built, but whoever reads the log must know."""
        clock, job = _clock(event), self._job
        if clock is None:
            raise self._broken(f"the guest sent the clock {repr(event.get('clock'))[:100]}")
        expected = job.expected_clock() if job.set_clock is None else (self.report.clock_start or 0) + self.report.duration_s
        self.report.clock_end = clock
        self.report.clock_drift_s = round(clock - expected, 3)
        if abs(self.report.clock_drift_s) > CLOCK_TOLERANCE_S:
            shown = f"{_shown(clock)}, not {_shown(expected)}"
            self._listener.log(f"\noffload: warning: the guest's clock shows {shown} at the end of the build\n")

    def _finish(self) -> None:
        wanted = self._job.keep_failed or not self.report.exit_status
        if wanted and self._job.outputs and not self._complete:
            raise self._broken("the guest ended without its outputs")
        if self.report.missing_outputs and not self.report.exit_status:
            names = ", ".join(self.report.missing_outputs)
            what = f"all steps passed, but no file matches the outputs {names}"
            raise BuildFailedError(what, hint="`outputs` in offload.yaml")
        self._done = True

    def _not_packed(self, why: str) -> BuildFailedError:
        """What a build has left is its own doing: files that it may not read itself, names without end."""
        if status := self.report.exit_status:
            step = f"step {self.report.failed_step} of {len(self._job.steps)} failed with exit status {status}"
            return BuildFailedError(f"{step}, and its directory cannot be sent: {why}")
        return BuildFailedError(f"all steps passed, but the outputs cannot be sent: {why}")

    def _broken(self, what: str, *, error: type[ProtocolError] | type[SshError] = ProtocolError) -> ProtocolError | SshError:
        return error(what, detail=clean(self._stderr.decode(errors="replace")))


def _number(event: dict[str, Any], field: str) -> int:
    value = event.get(field)
    if type(value) is not int or not 0 <= value <= 1_000_000:
        raise ProtocolError(f"the guest sent {field} {repr(value)[:100]}")
    return value


def _clock(event: dict[str, Any]) -> float | None:
    """Seconds since 1970.  A guest can send anything: NaN, which is neither near nor far, and numbers that no float holds."""
    clock = event.get("clock")
    if isinstance(clock, bool) or not isinstance(clock, int | float):
        return None
    try:
        seconds = float(clock)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def _shown(moment: object) -> str:
    """A guest's clock as text, whatever the guest has sent."""
    try:
        return format_date(datetime.fromtimestamp(float(moment), UTC))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return repr(moment)[:100]
