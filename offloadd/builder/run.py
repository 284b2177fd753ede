"""One build in a guest that we are logged in to.

The guest's build service is started over the channel and spoken to in frames (`offloadd.guest.frames`).  As long as the channel
is open the build has somebody who wants it; when it closes the service ends everything that the build started.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import trio

from offloadd.builder.outputs import OutputsReceiver
from offloadd.errors import BuildFailedError, BuildTimeoutError, ProtocolError, SshError, UsageError
from offloadd.guest.frames import MAX_PAYLOAD, PIECE, Decoder, Frame, encode
from offloadd.guest.ssh import Guest, GuestProcess
from offloadd.model.quantity import format_date, format_duration
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.console import clean

COMMAND = "sudo -n /usr/lib/offload/build-service"
PREPARE_S = 900.0
"""For the guest to take the source and to find its disk."""
LAST_WORDS_S = 2.0
"""For what a build service that ended has said."""
CLOCK_TOLERANCE_S = 10.0
MAX_LOG_BYTES = 1 << 30
_LEAST_LOG_BYTES = 64
"""What any piece of the log counts for: that much of an event is around each, and a guest may send single bytes."""

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
    environment: str
    """The serial of the environment's disk."""
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
    exit_status: int = 0
    failed_step: int = 0
    missing_outputs: tuple[str, ...] = ()
    duration_s: float = 0.0


class Listener(Protocol):
    """Who is told what happens in a build (the build's event log)."""

    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def log(self, text: str) -> None: ...
    def collecting(self) -> None: ...


async def run_build(guest: Guest, job: Job, outputs: OutputsReceiver, listener: Listener) -> Report:
    """Run the job; its outputs are in `outputs` afterwards.

    Returns:
        The report, also when a step failed: `exit_status` is not zero then.
    Raises:
        BuildTimeoutError: the build took or was silent for too long.
        BuildFailedError: it succeeded, but outputs are missing; or its log is too large.
        ProtocolError, SshError: the guest did not keep to the protocol, or shows a wrong clock.
    """
    async with guest.open_process(COMMAND) as process:
        session = _Session(process, job, outputs, listener)
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(session.read_errors)
            nursery.start_soon(session.send_source)
            await session.receive()
            nursery.cancel_scope.cancel()
        return session.report


class _Session:
    def __init__(self, process: GuestProcess, job: Job, outputs: OutputsReceiver, listener: Listener) -> None:
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
            "protocol": 1,
            "build": job.build,
            "environment": job.environment,
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
            async with await trio.open_file(job.source, "rb") as file:
                while piece := await file.read(PIECE):
                    await self._process.send(encode(b"S", piece))
            await self._process.send(encode(b"s"))
        except SshError:
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
                    raise self._broken("the guest's build service ended early", error=SshError)
                for frame in self._decoder.feed(data):
                    self._take(frame)
        if self._done:
            return
        if not self.report.started:
            raise self._broken(f"the guest did not begin the build within {format_duration(PREPARE_S)}", error=SshError)
        if self._silence.cancelled_caught:
            raise BuildTimeoutError(f"no output for {format_duration(self._job.max_silent_s)}", hint="--max-silent-time")
        raise BuildTimeoutError(f"took longer than {format_duration(self._job.timeout_s)}", hint="--timeout")

    def _take(self, frame: Frame) -> None:
        match frame.kind:
            case b"L":
                self._log(frame.payload)
            case b"E":
                self._event(frame.json())
            case b"O" if self._exited:
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

    def _event(self, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "started" if not self.report.started:
                self._started(event)
            case "step" if self.report.started:
                self._begin_step(_number(event, "index"))
            case "exit" if self.report.started and not self._exited:
                self._exit(event)
            case "outputs" if self._exited:
                self._note_missing(event.get("missing"))
            case "error":
                raise self._broken(f"the guest's build service: {clean(str(event.get('what'))[:1000])}")
            case other:
                raise self._broken(f"the guest sent the event {repr(other)[:100]} out of order")

    def _started(self, event: dict[str, Any]) -> None:
        clock, expected = event.get("clock"), self._job.expected_clock()
        # A guest can send NaN, which is neither near nor far, and numbers that no float holds.
        near = isinstance(clock, (int, float)) and expected - CLOCK_TOLERANCE_S <= clock <= expected + CLOCK_TOLERANCE_S
        if not near:
            shown = _shown(clock)
            raise self._broken(f"the guest's clock shows {shown}, not {_shown(expected)}: the build was not started")
        self.report.started = event
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
        self._listener.collecting()

    def _finish(self) -> None:
        wanted = self._job.keep_failed or not self.report.exit_status
        if wanted and self._job.outputs and not self._complete:
            raise self._broken("the guest ended without its outputs")
        if self.report.missing_outputs and not self.report.exit_status:
            names = ", ".join(self.report.missing_outputs)
            what = f"all steps passed, but no file matches the outputs {names}"
            raise BuildFailedError(what, hint="`outputs` in offload.yaml")
        self._done = True

    def _broken(self, what: str, *, error: type[ProtocolError] | type[SshError] = ProtocolError) -> ProtocolError | SshError:
        return error(what, detail=clean(self._stderr.decode(errors="replace")))


def _number(event: dict[str, Any], field: str) -> int:
    value = event.get(field)
    if type(value) is not int or not 0 <= value <= 1_000_000:
        raise ProtocolError(f"the guest sent {field} {repr(value)[:100]}")
    return value


def _shown(moment: object) -> str:
    """A guest's clock as text, whatever the guest has sent."""
    try:
        return format_date(datetime.fromtimestamp(float(moment), UTC))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return repr(moment)[:100]
