"""The daemon's builds before they are given to a machine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from offloadd.config.library import Library
from offloadd.daemon import builds as builds_module
from offloadd.daemon.active import ActiveBuild
from offloadd.daemon.builds import SOURCE_S, Builds
from offloadd.daemon.dispatch import Dispatcher
from offloadd.daemon.machines import Machines
from offloadd.daemon.perform import Performer
from offloadd.daemon.pool import Pool
from offloadd.daemon.workshop import Workshop
from offloadd.errors import BuildFailedError, BuildTimeoutError, HostError, NotFoundError, SshError
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import BuildState
from offloadd.paths import Paths
from offloadd.route import Decision, MachineFacts, Needs, find_route
from offloadd.store.database import Database, open_database

from .plans import machine

REQUEST = BuildRequest.model_validate({"recipe": {"name": "r", "steps": ["true"]}})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(tmp_path / "state/db") as opened:
        yield opened


class Shop:
    """What `Builds` needs of a workshop."""

    def __init__(self, root: Path, database: Database) -> None:
        self.paths = Paths(config=root, state=root / "state", cache=root, runtime=root)
        self.database = database

    def library(self) -> Library:
        return Library(machines={"m": machine()}, images={}, folders={})


@pytest.fixture
def shop(tmp_path: Path, database: Database) -> Workshop:
    return cast(Workshop, Shop(tmp_path, database))


class Anybody:
    """A dispatcher that has a machine for everything."""

    async def decide(self, needs: Needs) -> Decision:
        return find_route(needs, [machine()], {"m": MachineFacts(systems=(needs.system,))}, 0.0)


@asynccontextmanager
async def open_builds(shop: Workshop) -> AsyncIterator[Builds]:
    async with trio.open_nursery() as nursery:
        yield Builds(shop, cast(Pool, None), cast(Machines, SimpleNamespace()), cast(Dispatcher, Anybody()), nursery)


async def told(builds: Builds, build: str) -> list[dict[str, Any]]:
    text = b"".join([piece async for piece in builds.events(build)])
    return [json.loads(line) for line in text.splitlines()]


async def no_pieces() -> AsyncIterator[bytes]:
    await trio.lowlevel.checkpoint()
    yield b"tar"


async def test_a_source_that_never_comes(shop: Workshop, autojump_clock: trio.testing.MockClock) -> None:
    async with open_builds(shop) as builds:
        build = await builds.create(REQUEST)
        began = trio.current_time()
        events = await told(builds, build)
        assert trio.current_time() - began == pytest.approx(SOURCE_S)
    assert (events[-1]["state"], events[-1]["exit_status"]) == ("cancelled", 130)
    assert events[-2]["what"] == "its source was not sent"
    assert shop.database.build(build).state is BuildState.CANCELLED
    assert len(builds) == 0


@pytest.mark.parametrize(
    ("error", "state", "status"),
    [
        (None, "succeeded", 0),
        (BuildFailedError("step 1 failed"), "failed", 1),
        (BuildTimeoutError("too long"), "timed-out", 124),
        (SshError("broken"), "errored", 75),
        (OSError(28, "No space left on device"), "errored", 75),
        (PermissionError(13, "Permission denied", "/x"), "errored", 75),
        # Our own fault: one build ends by it, not the daemon with all of them.
        (KeyError("never thought of"), "errored", 75),
    ],
)
async def test_each_end_has_its_state(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, error: Exception | None, state: str, status: int
) -> None:
    async def perform(_: Performer, active: ActiveBuild) -> None:
        for step in (BuildState.PREPARING, BuildState.RUNNING, BuildState.COLLECTING):
            shop.database.move_build(active.id, step)
        if error:
            raise error

    monkeypatch.setattr(Performer, "perform", perform)
    async with open_builds(shop) as builds:
        build = await builds.create(REQUEST)
        await builds.take_source(build, no_pieces())
        events = await told(builds, build)
    assert (events[-1]["event"], events[-1]["state"], events[-1]["exit_status"]) == ("end", state, status)
    row = shop.database.build(build)
    assert row.state == state
    kept = json.loads((shop.paths.builds / build / "build.json").read_text())
    assert kept == row.result
    assert kept["state"] == state
    assert ("error" in kept) == bool(error)


async def test_what_breaks_while_a_build_is_cancelled_does_not_hide_that(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def perform(*_: object) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise SshError("broke while it was torn down")

    monkeypatch.setattr(Performer, "perform", perform)
    async with open_builds(shop) as builds:
        build = await builds.create(REQUEST)
        await builds.take_source(build, no_pieces())
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(builds.cancel, build)
            nursery.start_soon(builds.cancel, build)
        events = await told(builds, build)
    assert (events[-1]["state"], events[-2]["what"]) == ("cancelled", "cancelled by its user")


async def test_draining_gives_builds_a_moment_and_then_cancels_them(
    shop: Workshop, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_builds(shop) as builds:
        build = await builds.create(REQUEST)
        began = trio.current_time()
        await builds.drain(10)
        assert trio.current_time() - began == pytest.approx(10)
        assert shop.database.build(build).state is BuildState.CANCELLED
        await builds.drain(10)
        assert trio.current_time() - began == pytest.approx(10)


async def test_draining_in_a_hurry(shop: Workshop, autojump_clock: trio.testing.MockClock) -> None:
    async with open_builds(shop) as builds:
        build = await builds.create(REQUEST)
        builds.hurry()
        await builds.drain(10)
        assert trio.current_time() == autojump_clock.current_time()
        assert shop.database.build(build).state is BuildState.CANCELLED
        await builds.drain(0)


async def test_builds_that_there_are_not(shop: Workshop) -> None:
    async with open_builds(shop) as builds:
        with pytest.raises(NotFoundError):
            builds.folder("../etc")
        with pytest.raises(NotFoundError):
            await builds.cancel("nothing")


async def test_an_end_that_cannot_be_stored_is_told(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that succeeded is not said to have been lost; and the daemon can end."""

    async def perform(_: Performer, active: ActiveBuild) -> None:
        for step in (BuildState.PREPARING, BuildState.RUNNING, BuildState.COLLECTING):
            shop.database.move_build(active.id, step)
        active.outputs.write_bytes(b"tar")
        with pytest.raises(NotFoundError):  # it may not be all yet
            builds.outputs(active.id)
        monkeypatch.setattr(Database, "move_build", full)

    def full(*_: object, **__: object) -> None:
        raise HostError("the disk is full")

    monkeypatch.setattr(Performer, "perform", perform)
    async with open_builds(shop) as builds:
        build = await builds.create(REQUEST)
        await builds.take_source(build, no_pieces())
        events = await told(builds, build)
        assert (events[-1]["event"], events[-1]["state"], events[-1]["exit_status"]) == ("end", "succeeded", 0)
        assert len(builds) == 0
        assert builds.outputs(build).read_bytes() == b"tar"
        await builds.cancel(build)
        await builds.drain(1)


async def test_the_files_of_old_builds_go_and_those_of_one_that_runs_stay(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds_module, "KEPT_BUILDS", 2)

    async def perform(_: Performer, active: ActiveBuild) -> None:
        for step in (BuildState.PREPARING, BuildState.RUNNING, BuildState.COLLECTING):
            shop.database.move_build(active.id, step)
        if active.request.name == "long":
            await trio.sleep_forever()

    monkeypatch.setattr(Performer, "perform", perform)
    long = BuildRequest.model_validate({"recipe": {"name": "long", "steps": ["true"]}})
    async with open_builds(shop) as builds:
        first = await builds.create(long)
        await builds.take_source(first, no_pieces())
        made = []
        for _ in range(5):
            made.append(await builds.create(REQUEST))
            await builds.take_source(made[-1], no_pieces())
            await told(builds, made[-1])
        assert {path.name for path in shop.paths.builds.iterdir()} == {first, *made[-2:]}
        await builds.cancel(first)
        # Now it is an old one, too.
        last = await builds.create(REQUEST)
        await builds.cancel(last)
        assert {path.name for path in shop.paths.builds.iterdir()} == {made[-1], last}


async def test_a_request_that_cannot_be_stored_leaves_nothing(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise HostError("the disk is full")

    monkeypatch.setattr(Database, "add_build", full)
    async with open_builds(shop) as builds:
        with pytest.raises(HostError):
            await builds.create(REQUEST)
        assert len(builds) == 0
    assert not list(shop.paths.builds.iterdir())
