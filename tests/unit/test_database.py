"""The daemon's database."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.breaker import Breaker
from offloadd.errors import HostError, NotFoundError
from offloadd.model.state import BUILD_MOVES, MACHINE_MOVES, BuildState, MachineMode, MachineState
from offloadd.store.database import Database, Quirk, open_database

B, M = BuildState, MachineState

VERSION_1 = """
    CREATE TABLE build (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        version TEXT NOT NULL,
        machine TEXT NOT NULL DEFAULT '',
        state TEXT NOT NULL,
        request TEXT NOT NULL,
        result TEXT NOT NULL DEFAULT '{}',
        created REAL NOT NULL,
        ended REAL
    ) STRICT;
    CREATE INDEX build_created ON build (created);
    CREATE INDEX build_state ON build (state);
    CREATE TABLE machine (
        name TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        reason TEXT NOT NULL,
        detail TEXT NOT NULL,
        since REAL NOT NULL
    ) STRICT;
    PRAGMA user_version = 1;
"""
"""As the first release wrote it: never to be changed."""
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


def test_an_owner_s_word_outlives_restarts_and_the_states_of_a_vm(path: Path) -> None:
    with open_database(path) as database:
        assert database.machine_mode("m") is MachineMode.ONLINE
        database.set_machine_mode("m", MachineMode.OFFLINE)
        database.set_machine_mode("m", MachineMode.DRAINED)
        assert database.machines() == []
        for state in (M.STARTING, M.RUNNING, M.CRASHED):
            database.move_machine("m", state)
    with open_database(path) as database:
        assert database.machine_mode("m") is MachineMode.DRAINED
        assert database.machine("m").state is M.CRASHED
        assert database.machine_mode("other") is MachineMode.ONLINE
        database.set_machine_mode("m", MachineMode.ONLINE)
        assert database.machine_mode("m") is MachineMode.ONLINE


def test_a_breaker_outlives_a_restart(path: Path) -> None:
    breaker = Breaker()
    with open_database(path) as database:
        assert database.breaker("m") == breaker
        for _ in range(3):
            breaker = database.breaker("m").after_failure(1_700_000_000.25)
            database.store_breaker("m", breaker)
    with open_database(path) as database:
        assert database.breaker("m") == breaker == Breaker(3, 1_700_000_060.25)
        assert database.breaker("other") == Breaker()
        database.store_breaker("m", breaker.after_success())
        assert database.breaker("m") == Breaker()


def test_quirks_are_kept_by_package_and_system_type(path: Path) -> None:
    began = time.time()
    with open_database(path) as database:
        database.add_quirk("hello", "s390x-linux", "died of SIGILL", "b2")
        database.add_quirk("hello", "aarch64-linux", "was stuck", "b1")
        database.add_quirk("bash", "s390x-linux", "was stuck", "b3")
    with open_database(path) as database:
        known = [(quirk.name, quirk.system, quirk.reason, quirk.build) for quirk in database.quirks()]
        assert known == [
            ("bash", "s390x-linux", "was stuck", "b3"),
            ("hello", "aarch64-linux", "was stuck", "b1"),
            ("hello", "s390x-linux", "died of SIGILL", "b2"),
        ]
        assert began <= database.quirks()[0].created <= time.time()
        assert database.quirk("hello", "aarch64-linux") == database.quirks()[1]
        assert database.quirk("bash", "aarch64-linux") is None


def test_the_newest_reason_is_the_one_that_is_kept(database: Database) -> None:
    database.add_quirk("hello", "aarch64-linux", "was stuck", "b1")
    database.add_quirk("hello", "aarch64-linux", "died of SIGILL", "b2")
    (quirk,) = database.quirks()
    assert quirk == Quirk(name="hello", system="aarch64-linux", reason="died of SIGILL", build="b2", created=quirk.created)


def test_quirks_are_forgotten_by_the_pair_or_by_the_package(database: Database) -> None:
    for name in ("hello", "bash"):
        for system in ("aarch64-linux", "s390x-linux"):
            database.add_quirk(name, system, "was stuck", "b")
    assert database.forget_quirks("hello", "armhf-linux") == 0
    assert database.forget_quirks("hello", "aarch64-linux") == 1
    assert [(quirk.name, quirk.system) for quirk in database.quirks() if quirk.name == "hello"] == [("hello", "s390x-linux")]
    assert database.forget_quirks("bash", None) == 2
    assert database.forget_quirks("bash") == 0
    assert len(database.quirks()) == 1


def test_what_is_known_of_machines_and_cannot_be_written_is_an_error_of_ours(path: Path) -> None:
    with open_database(path) as database:
        other = sqlite3.connect(path)
        for table in ("machine_mode", "breaker", "quirk"):
            other.execute(f"DROP TABLE {table}")
        other.close()
        with pytest.raises(HostError, match="cannot be written"):
            database.set_machine_mode("m", MachineMode.DRAINED)
        with pytest.raises(HostError, match="cannot be written"):
            database.store_breaker("m", Breaker(3, 1.0))
        with pytest.raises(HostError, match="cannot be written"):
            database.add_quirk("hello", "aarch64-linux", "was stuck", "b")
        with pytest.raises(HostError, match="cannot be written"):
            database.forget_quirks("hello")


def test_a_database_of_the_first_version_loses_nothing(path: Path) -> None:
    path.parent.mkdir()
    old = sqlite3.connect(path)
    old.executescript(VERSION_1)
    request, result = {"recipe": {"name": "hello", "steps": ["true"]}}, {"date": "2020-01-01T00:00:00Z"}
    old.execute(
        "INSERT INTO build VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        ("b1", "hello", "2.10", "build-vm", "succeeded", json.dumps(request), json.dumps(result), 1.5, 2.5),
    )
    old.execute("INSERT INTO build (id, name, version, state, request, created) VALUES ('b2', 'bash', '5', 'queued', '{}', 3)")
    old.execute("INSERT INTO machine VALUES ('build-vm', 'running', 'asked for', 'last words', 4.5)")
    old.commit()
    old.close()
    for _ in range(2):  # the second time nothing is left to migrate
        with open_database(path) as database:
            row = database.build("b1")
            assert (row.name, row.version, row.machine, row.state) == ("hello", "2.10", "build-vm", B.SUCCEEDED)
            assert (row.request, row.result, row.created, row.ended) == (request, result, 1.5, 2.5)
            assert [row.id for row in database.builds(open_only=True)] == ["b2"]
            (machine,) = database.machines()
            assert (machine.name, machine.state, machine.reason) == ("build-vm", M.RUNNING, "asked for")
            assert (machine.detail, machine.since) == ("last words", 4.5)
            assert database.machine_mode("build-vm") is MachineMode.ONLINE
            assert database.breaker("build-vm") == Breaker()
            assert database.quirks() == []
    with open_database(path) as database:
        database.move_build("b2", B.CANCELLED)
        database.set_machine_mode("build-vm", MachineMode.OFFLINE)
        database.store_breaker("build-vm", Breaker(1))
        database.add_quirk("hello", "aarch64-linux", "was stuck", "b1")
        assert len(database.quirks()) == 1


def test_an_old_and_a_new_database_have_the_same_schema(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "old")
    old.executescript(VERSION_1)
    old.close()
    schemas = []
    for name in ("old", "new"):
        with open_database(tmp_path / name):
            pass
        connection = sqlite3.connect(tmp_path / name)
        schemas.append(
            [" ".join(sql.split()) for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
        )
        connection.close()
    assert schemas[0] == schemas[1]
