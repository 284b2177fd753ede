"""The daemon's database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.errors import HostError, NotFoundError
from offloadd.model.state import BUILD_MOVES, MACHINE_MOVES, BuildState, MachineState
from offloadd.store.database import Database, open_database

B, M = BuildState, MachineState
GOOD_END = [B.QUEUED, B.PREPARING, B.BOOTING, B.RUNNING, B.COLLECTING, B.SUCCEEDED]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/offload.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with open_database(path) as opened:
        yield opened


def test_a_build_from_its_request_to_its_end(database: Database, path: Path) -> None:
    database.add_build("b1", "hello", "2.10", {"recipe": {"name": "hello"}})
    row = database.build("b1")
    assert (row.state, row.machine, row.request, row.result, row.ended) == (
        B.CREATED,
        "",
        {"recipe": {"name": "hello"}},
        {},
        None,
    )
    for state in GOOD_END[:-1]:
        database.move_build("b1", state, machine="m")
        assert database.build("b1").ended is None
    database.move_build("b1", B.SUCCEEDED, result={"date": "2020-01-01T00:00:00Z"})
    row = database.build("b1")
    assert (row.state, row.machine, row.result) == (B.SUCCEEDED, "m", {"date": "2020-01-01T00:00:00Z"})
    assert row.ended is not None
    assert row.ended >= row.created
    assert path.stat().st_mode & 0o777 == 0o600


def test_builds_are_told_newest_first(database: Database) -> None:
    for name in ("b1", "b2", "b3"):
        database.add_build(name, name, "0", {})
    database.move_build("b2", B.CANCELLED)
    assert [row.id for row in database.builds()] == ["b3", "b2", "b1"]
    assert [row.id for row in database.builds(limit=2)] == ["b3", "b2"]
    assert [row.id for row in database.builds(open_only=True)] == ["b3", "b1"]


def way_to(state: BuildState) -> list[BuildState]:
    return GOOD_END[: GOOD_END.index(state) + 1] if state in GOOD_END else [] if state is B.CREATED else [state]


@pytest.mark.parametrize("start", BuildState)
@pytest.mark.parametrize("state", BuildState)
def test_moves_of_builds_are_checked(database: Database, start: BuildState, state: BuildState) -> None:
    database.add_build("b", "b", "0", {})
    for step in way_to(start):
        database.move_build("b", step)
    if state in BUILD_MOVES[start]:
        database.move_build("b", state)
        assert database.build("b").state is state
    else:
        with pytest.raises(ValueError, match=f"cannot go from {start} to {state}"):
            database.move_build("b", state, result={"changed": True})
        assert database.build("b").state is start
        assert database.build("b").result == {}


def test_moves_of_machines_are_checked(database: Database) -> None:
    assert database.machine("m").state is M.STOPPED
    with pytest.raises(ValueError, match="cannot go from stopped to running"):
        database.move_machine("m", M.RUNNING)
    assert database.machines() == []
    database.move_machine("m", M.STARTING)
    database.move_machine("m", M.CRASHED, "panicked", "last words")
    database.move_machine("a", M.STARTING)
    row = database.machine("m")
    assert (row.state, row.reason, row.detail) == (M.CRASHED, "panicked", "last words")
    assert row.since > 0
    assert [row.name for row in database.machines()] == ["a", "m"]
    assert M.STARTING in MACHINE_MOVES[row.state]


def test_there_is_no_such_build(database: Database) -> None:
    with pytest.raises(NotFoundError):
        database.build("nothing")
    with pytest.raises(NotFoundError):
        database.move_build("nothing", B.QUEUED)


def test_what_was_stored_is_there_after_a_restart(path: Path) -> None:
    with open_database(path) as database:
        database.add_build("b", "b", "0", {})
        database.move_machine("m", M.STARTING)
    with open_database(path) as database:
        assert database.build("b").state is B.CREATED
        assert database.machine("m").state is M.STARTING


def test_an_empty_file_gets_the_schema(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with open_database(path) as database:
        assert database.builds() == []
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone()[0] >= 1
    connection.close()


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 1000")
    connection.close()
    with pytest.raises(HostError, match="newer offload"), open_database(path):
        pass
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1000,)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    connection.close()


def test_what_is_no_database(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is not a database, however long it is read" * 100)
    with pytest.raises(HostError) as caught, open_database(path):
        pass
    assert caught.value.subject == str(path)
    assert "move it away" in caught.value.hint


def test_a_database_that_cannot_be_opened(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(HostError, match="cannot be used"), open_database(path):
        pass


def test_what_cannot_be_written_is_an_error_of_ours(path: Path) -> None:
    with open_database(path) as database:
        other = sqlite3.connect(path)
        other.execute("DROP TABLE build")
        other.close()
        with pytest.raises(HostError, match="cannot be written"):
            database.add_build("b", "b", "0", {})
