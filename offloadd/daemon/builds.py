"""The builds: taken, queued, run, cancelled, kept."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import AsyncIterable, AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

from offloadd.daemon.active import OUTPUTS, ActiveBuild
from offloadd.daemon.dispatch import Dispatcher
from offloadd.daemon.events import EventLog, read_events
from offloadd.daemon.machines import Machines
from offloadd.daemon.own_fault import own_fault
from offloadd.daemon.perform import Performer
from offloadd.daemon.pool import Pool
from offloadd.daemon.work import check_kept, choose_system, find_needs
from offloadd.daemon.workshop import Workshop
from offloadd.errors import (
    BuildFailedError,
    BuildTimeoutError,
    CancelledError,
    DaemonError,
    HostError,
    MachineLostError,
    NotFoundError,
    OffloadError,
    UsageError,
)
from offloadd.model.quantity import format_date
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import BuildState
from offloadd.process import host_error
from offloadd.route import Decision
from offloadd.store.database import BuildRow

log = structlog.get_logger()

SOURCE_S = 120.0
"""For the next piece of a build's source."""
KEPT_BUILDS = 200
"""Builds whose logs and outputs are kept."""


class Builds:
    """All builds.  `nursery` owns their tasks."""

    def __init__(
        self, workshop: Workshop, pool: Pool, machines: Machines, dispatcher: Dispatcher, nursery: trio.Nursery
    ) -> None:
        self._workshop = workshop
        self._dispatcher = dispatcher
        self._performer = Performer(shop=workshop, pool=pool, machines=machines, dispatcher=dispatcher, move=self._move)
        self._nursery = nursery
        self._active: dict[str, ActiveBuild] = {}
        self._closed = False
        self._hurry = trio.Event()

    def refuse_new(self) -> None:
        """The daemon is about to end."""
        self._closed = True

    def __len__(self) -> int:
        return len(self._active)

    def folder(self, build: str) -> Path:
        return self._workshop.paths.builds / self._workshop.database.build(build).id

    def outputs(self, build: str) -> Path:
        """A tar of what it gave.

        Raises:
            NotFoundError: it gave nothing, or not yet all of it.
        """
        path = self.folder(build) / OUTPUTS
        if path.parent.name in self._active or not path.exists():
            raise NotFoundError("has no outputs", subject=build)
        return path

    async def decide(self, request: BuildRequest) -> Decision:
        """Which machine a request would go to now, and why; nothing is fetched or built.

        Raises:
            NotFoundError, UsageError: it names what does not exist.
        """
        system = choose_system(request)
        check_kept(request)
        date = request.asked_date
        if date == "auto":
            # Not known before the source is: any date needs the same machine.
            date = request.released.date if request.released else datetime.now(UTC)
        remembered = self._workshop.database.quirk(request.name, system)
        return await self._dispatcher.decide(find_needs(request, system, date, quirk=remembered.reason if remembered else ""))

    async def create(self, request: BuildRequest) -> str:
        """Take a request; its source comes next.

        Raises:
            NotFoundError, NoMachineError, UsageError: nobody could do it, so that the source need not be sent.
        """
        if self._closed:
            raise DaemonError("the daemon is being stopped", subject=request.name, hint="try again in a moment")
        (await self.decide(request)).best()
        build = secrets.token_hex(4)
        folder = self._workshop.paths.builds / build
        folder.mkdir(mode=0o700, parents=True)
        try:
            active = ActiveBuild(build, request, choose_system(request), folder, EventLog(folder / "events.ndjson"))
            self._workshop.database.add_build(build, request.name, request.version, request.to_json())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._active[build] = active
        self._nursery.start_soon(self._run, active)
        await self._drop_old()
        return build

    async def take_source(self, build: str, pieces: AsyncIterable[bytes]) -> None:
        """Take the source as a tar and queue the build."""
        active = self._find_active(build)
        if active.source_begun:
            raise UsageError("has its source already", subject=build)
        active.source_begun = True
        try:
            async with await trio.open_file(active.source, "wb") as file:
                async for piece in pieces:
                    active.waiting.deadline = trio.current_time() + SOURCE_S
                    await file.write(piece)
        except BaseException as exc:  # also when the client went away: nobody sends the rest
            active.cancelled = active.cancelled or "its source was not received to the end"
            active.scope.cancel()
            if isinstance(exc, OSError):
                raise host_error(exc, build, active.folder) from exc
            raise
        if active.ended.is_set():
            active.source.unlink(missing_ok=True)
            raise UsageError("has ended meanwhile", subject=build)
        active.source_complete.set()

    async def cancel(self, build: str, why: str = "cancelled by its user") -> None:
        """Cancel a build and wait until nothing of it is left; nothing happens when it has ended already."""
        active = self._active.get(self._workshop.database.build(build).id)
        if active is None:
            return
        active.cancelled = active.cancelled or why
        active.scope.cancel()
        await active.ended.wait()

    async def drain(self, limit_s: float) -> None:
        """Let builds that run end within the limit, then cancel them."""
        with trio.move_on_after(limit_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wait_for_hurry, nursery.cancel_scope)
                for active in list(self._active.values()):
                    await active.ended.wait()
                nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            for build in list(self._active):
                nursery.start_soon(self.cancel, build, "the daemon was stopped")

    def hurry(self) -> None:
        """Cut `drain` short."""
        self._hurry.set()

    async def _wait_for_hurry(self, draining: trio.CancelScope) -> None:
        await self._hurry.wait()
        draining.cancel()

    def events(self, build: str) -> AsyncIterator[bytes]:
        """What happened in the build as JSON lines, to its end."""
        folder = self.folder(build)
        active = self._active.get(build)
        return active.events.follow() if active else read_events(folder / "events.ndjson")

    def reconcile(self) -> None:
        """Builds of an earlier daemon are lost: say so."""
        for row in self._workshop.database.builds(limit=10_000, open_only=True):
            error = MachineLostError("the daemon ended during the build", subject=row.id, hint="offload build again")
            events = EventLog(self._workshop.paths.builds / row.id / "events.ndjson") if self.folder(row.id).is_dir() else None
            result = self._summary(row) | {"state": BuildState.ERRORED, "error": error.to_json()}
            for scratch in (self._workshop.paths.builds / row.id).glob("source*"):
                scratch.unlink()
            # Last of all the state: a daemon that ends in between has the next one say it again.
            if events:
                events.append("error", **error.to_json())
                events.append("end", state=BuildState.ERRORED, exit_status=error.exit_status, result=result)
                events.close()
            self._workshop.database.move_build(row.id, BuildState.ERRORED, result=result)

    def _find_active(self, build: str) -> ActiveBuild:
        row = self._workshop.database.build(build)
        if row.id not in self._active:
            raise UsageError(f"has ended ({row.state})", subject=build)
        return self._active[row.id]

    def _move(self, active: ActiveBuild, state: BuildState, **changes: Any) -> None:
        self._workshop.database.move_build(active.id, state, **changes)
        active.events.append("state", state=state, machine=changes.get("machine", active.result.get("machine", "")))

    async def _drop_old(self) -> None:
        """Forget the files of the oldest builds; their rows stay."""
        keep = {row.id for row in self._workshop.database.builds(limit=KEPT_BUILDS)} | self._active.keys()
        for folder in [folder for folder in self._workshop.paths.builds.iterdir() if folder.name not in keep]:
            await trio.to_thread.run_sync(partial(shutil.rmtree, folder, ignore_errors=True))

    async def _run(self, active: ActiveBuild) -> None:
        """One build from the queue to its end; nothing it does ends another."""
        state = BuildState.CANCELLED
        error: OffloadError | None = None
        active.summary = self._summary(self._workshop.database.build(active.id)) | {"system": active.system}
        active.result = dict(active.summary)
        try:
            with active.scope:
                await self._wait_for_source(active)
                await self._performer.perform(active)
                state = BuildState.SUCCEEDED
        except BuildFailedError as exc:
            state, error = BuildState.FAILED, exc
        except BuildTimeoutError as exc:
            state, error = BuildState.TIMED_OUT, exc
        except OffloadError as exc:
            state, error = BuildState.ERRORED, exc
        except OSError as exc:
            state, error = BuildState.ERRORED, host_error(exc, active.id, active.folder)
        except Exception as exc:
            # It must not take the other builds and the machines along.
            state, error = BuildState.ERRORED, own_fault(exc, active.request.name)
        finally:
            if active.cancelled and state is BuildState.ERRORED:
                state = BuildState.CANCELLED  # what broke while everything was torn down
            try:
                self._end(active, state, error)
            except (OSError, HostError) as exc:
                # The disk is full: the next daemon finds the build open and says what became of it.
                log.error("the build's end could not be stored", build=active.id, state=str(state), error=str(exc))
            finally:
                active.events.close()
                del self._active[active.id]
                active.ended.set()

    async def _wait_for_source(self, active: ActiveBuild) -> None:
        """A client that has gone does not send it any more."""
        active.waiting.deadline = trio.current_time() + SOURCE_S
        with active.waiting:
            await active.source_complete.wait()
        if not active.source_complete.is_set():
            active.cancelled = "its source was not sent"
            active.scope.cancel()
            await trio.lowlevel.checkpoint()
        self._move(active, BuildState.QUEUED)

    def _end(self, active: ActiveBuild, state: BuildState, error: OffloadError | None) -> None:
        for scratch in active.folder.glob("source*"):
            scratch.unlink()
        if state is BuildState.CANCELLED:
            error = CancelledError(active.cancelled or "cancelled", subject=active.request.name)
        if error is not None:
            error.subject = error.subject or active.request.name
            active.result["error"] = error.to_json()
            active.events.append("error", **error.to_json())
        active.result |= {"state": state, "ended": format_date(datetime.now(UTC))}
        # Whoever follows it hears of its end, though the disk may have no room for that.
        active.events.append("end", state=state, exit_status=error.exit_status if error else 0, result=active.result)
        self._workshop.database.move_build(active.id, state, result=active.result)
        new = active.folder / "build.json.new"
        new.write_text(json.dumps(active.result, indent=2) + "\n")
        new.rename(active.folder / "build.json")
        log.info("build ended", build=active.id, name=active.request.name, state=str(state))

    def _summary(self, row: BuildRow) -> dict[str, Any]:
        return {"build": row.id, "name": row.name, "version": row.version, "created": row.created}
