"""The daemon's database.  sqlite3 is used in this file alone.

A state moves inside the transaction that stores it, and only as the tables of `offloadd.model.state` allow.  Calls take well
under a millisecond (WAL, no fsync for each commit), so they are made from trio tasks directly.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offloadd.breaker import Breaker
from offloadd.errors import HostError, NotFoundError
from offloadd.model.state import BUILD_MOVES, MACHINE_MOVES, BuildState, MachineMode, MachineState

_SCHEMA = (
    """
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
    """,
    # `machine` has the states of VMs.  What follows is about machines of all kinds: what the owner lets one do, which outlives
    # every state, and how it has failed lately.
    """
    CREATE TABLE machine_mode (
        name TEXT PRIMARY KEY,
        mode TEXT NOT NULL
    ) STRICT;
    CREATE TABLE breaker (
        name TEXT PRIMARY KEY,
        failures INTEGER NOT NULL,
        open_until REAL NOT NULL
    ) STRICT;
    CREATE TABLE quirk (
        name TEXT NOT NULL,
        system TEXT NOT NULL,
        reason TEXT NOT NULL,
        build TEXT NOT NULL,
        created REAL NOT NULL,
        PRIMARY KEY (name, system)
    ) STRICT;
    """,
)
"""One entry for each version of the schema; `user_version` counts those applied."""


@dataclass(frozen=True, kw_only=True)
class BuildRow:
    """One build as stored.  Times are Unix times."""

    id: str
    name: str
    version: str
    machine: str
    state: BuildState
    request: dict[str, Any]
    result: dict[str, Any]
    created: float
    ended: float | None


@dataclass(frozen=True, kw_only=True)
class MachineRow:
    """The last state of one machine, and why."""

    name: str
    state: MachineState
    reason: str = ""
    detail: str = ""
    since: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Quirk:
    """A package that user emulation does not build for one system type: it goes to a whole machine straight away."""

    name: str
    system: str
    reason: str
    build: str
    """The build that showed it."""
    created: float
    """Unix time."""


class Database:
    """Made by `open_database` alone."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.DatabaseError as exc:
            raise HostError(f"the database cannot be written: {exc}", hint="is the disk full?") from exc

    def add_build(self, build: str, name: str, version: str, request: Mapping[str, Any]) -> None:
        with self._transaction():
            self._db.execute(
                "INSERT INTO build (id, name, version, state, request, created) VALUES (?, ?, ?, ?, ?, ?)",
                (build, name, version, BuildState.CREATED, json.dumps(request), time.time()),
            )

    def move_build(self, build: str, state: BuildState, **changes: Any) -> None:
        """Move a build to `state`; `machine` and `result` may change with it.

        Raises:
            NotFoundError: there is no such build.
            ValueError: the move is not allowed.
            HostError: it cannot be stored.
        """
        with self._transaction():
            now = self.build(build).state
            if state not in BUILD_MOVES[now]:
                raise ValueError(f"build {build} cannot go from {now} to {state}")
            self._db.execute("UPDATE build SET state = ? WHERE id = ?", (state, build))
            if "machine" in changes:
                self._db.execute("UPDATE build SET machine = ? WHERE id = ?", (changes["machine"], build))
            if "result" in changes:
                self._db.execute("UPDATE build SET result = ? WHERE id = ?", (json.dumps(changes["result"]), build))
            if state.final:
                self._db.execute("UPDATE build SET ended = ? WHERE id = ?", (time.time(), build))

    def build(self, build: str) -> BuildRow:
        """Raises `NotFoundError` when there is none."""
        row = self._db.execute("SELECT * FROM build WHERE id = ?", (build,)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no build {build!r}", hint="offload builds")
        return _build_row(row)

    def builds(self, *, limit: int = 100, open_only: bool = False) -> list[BuildRow]:
        """The newest builds first."""
        ends = [state.value for state in BuildState if state.final]
        where = f"WHERE state NOT IN ({', '.join('?' * len(ends))})" if open_only else ""
        rows = self._db.execute(
            f"SELECT * FROM build {where} ORDER BY created DESC, rowid DESC LIMIT ?",  # noqa: S608 - only placeholders
            (*(ends if open_only else ()), limit),
        )
        return [_build_row(row) for row in rows]

    def machine(self, name: str) -> MachineRow:
        """The last state of a machine; STOPPED when it never ran."""
        row = self._db.execute("SELECT * FROM machine WHERE name = ?", (name,)).fetchone()
        if row is None:
            return MachineRow(name=name, state=MachineState.STOPPED)
        return MachineRow(**{**dict(row), "state": MachineState(row["state"])})

    def machines(self) -> list[MachineRow]:
        names = [row["name"] for row in self._db.execute("SELECT name FROM machine ORDER BY name")]
        return [self.machine(name) for name in names]

    def move_machine(self, name: str, state: MachineState, reason: str = "", detail: str = "") -> None:
        """Raises ValueError when the move is not allowed, HostError when it cannot be stored."""
        with self._transaction():
            now = self.machine(name).state
            if state not in MACHINE_MOVES[now]:
                raise ValueError(f"machine {name} cannot go from {now} to {state}")
            self._db.execute(
                "INSERT OR REPLACE INTO machine (name, state, reason, detail, since) VALUES (?, ?, ?, ?, ?)",
                (name, state, reason, detail, time.time()),
            )

    def machine_mode(self, name: str) -> MachineMode:
        """What the machine's owner lets it do; ONLINE unless something else was stored."""
        row = self._db.execute("SELECT mode FROM machine_mode WHERE name = ?", (name,)).fetchone()
        return MachineMode.ONLINE if row is None else MachineMode(row["mode"])

    def set_machine_mode(self, name: str, mode: MachineMode) -> None:
        """Raises `HostError` when it cannot be stored."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO machine_mode (name, mode) VALUES (?, ?)", (name, mode))

    def breaker(self, name: str) -> Breaker:
        """The machine's breaker; closed unless something else was stored."""
        row = self._db.execute("SELECT failures, open_until FROM breaker WHERE name = ?", (name,)).fetchone()
        return Breaker() if row is None else Breaker(**dict(row))

    def store_breaker(self, name: str, breaker: Breaker) -> None:
        """Raises `HostError` when it cannot be stored."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO breaker (name, failures, open_until) VALUES (?, ?, ?)",
                (name, breaker.failures, breaker.open_until),
            )

    def quirks(self) -> list[Quirk]:
        """All of them, by name and system type."""
        return [Quirk(**dict(row)) for row in self._db.execute("SELECT * FROM quirk ORDER BY name, system")]

    def quirk(self, name: str, system: str) -> Quirk | None:
        """What is known of the package `name` on machines of type `system`."""
        row = self._db.execute("SELECT * FROM quirk WHERE name = ? AND system = ?", (name, system)).fetchone()
        return None if row is None else Quirk(**dict(row))

    def add_quirk(self, name: str, system: str, reason: str, build: str) -> None:
        """Remember it; what was known of the pair before is forgotten.  Raises `HostError` when it cannot be stored."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO quirk (name, system, reason, build, created) VALUES (?, ?, ?, ?, ?)",
                (name, system, reason, build, time.time()),
            )

    def forget_quirks(self, name: str, system: str | None = None) -> int:
        """Forget what is known of the package on one system type, or on all; how many there were.

        Raises:
            HostError: it cannot be stored.
        """
        with self._transaction():
            return self._db.execute(
                "DELETE FROM quirk WHERE name = ? AND system = coalesce(?, system)", (name, system)
            ).rowcount


def _build_row(row: sqlite3.Row) -> BuildRow:
    values = dict(row)
    values |= {"state": BuildState(row["state"]), "request": json.loads(row["request"]), "result": json.loads(row["result"])}
    return BuildRow(**values)


@contextmanager
def open_database(path: Path) -> Iterator[Database]:
    """Open or make the database.

    Raises:
        HostError: it cannot be opened, is damaged, or was written by a newer offload.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = sqlite3.connect(path, isolation_level=None)
    except sqlite3.DatabaseError as exc:
        raise _unusable(path, exc) from exc
    with closing(connection):
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            _migrate(connection, path)
        except sqlite3.DatabaseError as exc:
            raise _unusable(path, exc) from exc
        path.chmod(0o600)
        yield Database(connection)


def _unusable(path: Path, exc: sqlite3.DatabaseError) -> HostError:
    return HostError(f"cannot be used: {exc}", subject=str(path), hint="move it away: a new one is made")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_SCHEMA):
        raise HostError("was written by a newer offload", subject=str(path))
    for number, script in enumerate(_SCHEMA[version:], version + 1):
        connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
