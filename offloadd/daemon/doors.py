"""The doors that are open: one for each record that a setup has left."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog
import trio
from pydantic import ValidationError

from offloadd.daemon.door import serve_door
from offloadd.daemon.door_socket import DoorSocket
from offloadd.daemon.service import Service
from offloadd.errors import ConfigError, HostError, OffloadError, Problem
from offloadd.model.door import Door
from offloadd.nursery import open_narrow_nursery

log = structlog.get_logger()


class Doors:
    """They are open for as long as the nursery.

    Args:
        nursery: owns what serves them.
    """

    def __init__(self, service: Service, nursery: trio.Nursery) -> None:
        self._service = service
        self._nursery = nursery
        self._open: dict[str, _Open] = {}
        self._lock = trio.Lock()

    async def refresh(self) -> list[Door]:
        """Read the records anew: close those that are gone or have changed, open the new ones; those that are open then.

        Raises:
            OffloadError: one of them cannot be opened, and says why; the others are.
        """
        async with self._lock:
            wanted, errors = await trio.to_thread.run_sync(_read_records, self._service.workshop.paths.doors)
            for name, known in list(self._open.items()):
                if wanted.get(name) != known.door:
                    known.scope.cancel()
                    await known.ended.wait()
            for name in wanted.keys() - self._open.keys():
                try:
                    await self._start(name, wanted[name])
                except OffloadError as exc:
                    errors.append(exc)
            for error in errors:
                log.error("door not open", error=str(error))
            if errors:
                raise errors[0]
            return [known.door for known in self._open.values()]

    async def _start(self, name: str, door: Door) -> None:
        made = await trio.to_thread.run_sync(DoorSocket, door)
        self._open[name] = _Open(door)
        self._nursery.start_soon(self._run, name, made)
        log.info("door open", socket=str(door.socket), uid=door.uid)

    async def _run(self, name: str, made: DoorSocket) -> None:
        opened = self._open[name]
        try:
            with opened.scope:
                await serve_door(self._service, opened.door, made.listener)
        finally:
            made.close()
            del self._open[name]
            opened.ended.set()


class _Open:
    def __init__(self, door: Door) -> None:
        self.door = door
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


@asynccontextmanager
async def open_doors(service: Service) -> AsyncIterator[Doors]:
    """Those that are recorded, and those that will be.  One that cannot be opened is in the log."""
    async with open_narrow_nursery() as nursery:
        doors = Doors(service, nursery)
        with suppress(OffloadError):  # it is logged; the daemon has other things to do
            await doors.refresh()
        yield doors
        nursery.cancel_scope.cancel()


def _read_records(folder: Path) -> tuple[dict[str, Door], list[OffloadError]]:
    doors: dict[str, Door] = {}
    errors: list[OffloadError] = []
    for file in sorted(folder.glob("*.json")):
        try:
            doors[file.stem] = Door.model_validate_json(file.read_bytes())
        except ValidationError as exc:
            message = f"is no record of a door: {exc.errors()[0]['msg']}"
            errors.append(ConfigError([Problem(file=str(file), line=0, field="", message=message)]))
        except OSError as exc:
            errors.append(HostError(f"{exc.strerror}", subject=str(file)))
    return doors, errors
