"""One build wherever our build service runs: in a guest of ours, on this host, on a remote one.

The build service there is started and spoken to in frames (`offloadd.guest.frames`).  As long as its channel is open the build
has somebody who wants it; when it closes the service ends everything that the build started.  `guest` is here whatever is at
the other end.
"""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from offloadd.builder.course import Course
from offloadd.builder.job import Job, Listener, Report
from offloadd.builder.outputs import OutputsReceiver
from offloadd.errors import ProtocolError, SshError, TransientError, UsageError
from offloadd.guest.frames import MAX_PAYLOAD, PIECE, Decoder, Frame, encode
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.console import clean

PROTOCOL = 3
LAST_WORDS_S = 2.0
"""For what a build service that ended has said."""


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
        session = _Session(process, job, outputs, Course(job, listener))
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(session.read_errors)
            nursery.start_soon(session.send_source)
            await session.receive()
            nursery.cancel_scope.cancel()
        return session.report


class _Session:
    def __init__(self, process: Channel, job: Job, outputs: OutputsReceiver, course: Course) -> None:
        self.report = course.report
        self._process = process
        self._job = job
        self._outputs = outputs
        self._course = course
        self._decoder = Decoder()
        self._no_more_errors = trio.Event()
        self._complete = self._done = False

    async def read_errors(self) -> None:
        while piece := await self._process.receive_error():
            self._course.add_error(piece)
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
        with self._course.limited():
            while not self._done:
                data = await self._process.receive()
                if not data:
                    with trio.move_on_after(LAST_WORDS_S):
                        await self._no_more_errors.wait()
                    raise self._course.broken("the build service ended early", error=SshError)
                for frame in self._decoder.feed(data):
                    await self._take(frame)

    async def _take(self, frame: Frame) -> None:
        exited = self._course.exited
        match frame.kind:
            case b"L":
                self._course.log(frame.payload)
            case b"E":
                await self._event(frame.json())
            case b"O" if exited and self.report.outputs_channel == "frames":
                self._outputs.write(frame.payload)
            case b"o" if exited:
                self._outputs.finish()
                self._complete = True
            case b"D" if exited:
                self._finish()
            case _:
                raise self._course.broken(f"the guest sent a frame {frame.kind!r} out of order")

    async def _event(self, event: dict[str, Any]) -> None:
        course, exited = self._course, self._course.exited
        match event.get("event"):
            case "started" if not self.report.started:
                course.start(event)
            case "step" if self.report.started:
                course.begin_step(_number(event, "index"))
            case "exit" if self.report.started and not exited:
                status = _number(event, "status")
                course.exit(status, _number(event, "step") if status else 0, event)
            case "outputs" if exited:
                self._note_missing(event.get("missing"))
            case "scratch" if exited and self._job.bulk.scratch and not self._outputs.size:
                await self._job.bulk.scratch.copy(event.get("size"), self._outputs)
                self.report.outputs_channel = "disk"
            case "error" if exited:
                raise course.not_packed(clean(str(event.get("what"))[:1000]))
            case "error":
                raise course.broken(f"the build service: {clean(str(event.get('what'))[:1000])}")
            case other:
                raise course.broken(f"the guest sent the event {repr(other)[:100]} out of order")

    def _note_missing(self, missing: object) -> None:
        """Only what was asked for can be missing."""
        if not isinstance(missing, list):
            raise self._course.broken("the guest does not say which outputs are missing")
        self.report.missing_outputs = tuple(pattern for pattern in self._job.outputs if pattern in missing)

    def _finish(self) -> None:
        if self._course.wants_outputs and not self._complete:
            raise self._course.broken("the guest ended without its outputs")
        self._course.finish()
        self._done = True


def _number(event: dict[str, Any], field: str) -> int:
    value = event.get(field)
    if type(value) is not int or not 0 <= value <= 1_000_000:
        raise ProtocolError(f"the guest sent {field} {repr(value)[:100]}")
    return value
