"""From a request to what is built: sources on this host, the recipe in full, the date."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trio

from offloadd.builder.debian import prepare_debian
from offloadd.builder.release_date import ReleaseDate, release_date_of_sources
from offloadd.daemon.workshop import Workshop
from offloadd.environment.recipe import EnvironmentRecipe, environment_recipe
from offloadd.errors import UsageError
from offloadd.host import native_systems
from offloadd.model.quantity import format_date
from offloadd.model.recipe import BuildRecipe, BuildRequest
from offloadd.model.system import SYSTEMS
from offloadd.process import Progress
from offloadd.route import Needs


@dataclass(frozen=True, kw_only=True)
class Work:
    """One build with nothing left open but the machine."""

    request: BuildRequest
    system: str
    recipe: BuildRecipe
    version: str
    """In full, where the recipe's is a part of a directory's name."""
    sources: tuple[Path, ...]
    """Files that are put into the build directory beside what was sent."""
    date: datetime | None
    date_from: str = ""
    """Where an automatic date comes from."""

    @property
    def environment(self) -> EnvironmentRecipe:
        return environment_recipe(self.recipe.suite, SYSTEMS[self.system].debian, self.recipe.packages)

    def needs(self, quirk: str = "") -> Needs:
        """What the router asks of a machine."""
        return find_needs(self.request, self.system, self.date, environment=self.environment.digest, quirk=quirk)


def choose_system(request: BuildRequest) -> str:
    """The system type to build for.

    Raises:
        UsageError: the recipe is not for the one that was asked for.
    """
    try:
        return request.choose_system(next(iter(native_systems()), ""))
    except ValueError as exc:
        raise UsageError(str(exc), subject=request.name, hint="`systems` in offload.yaml") from exc


def check_kept(request: BuildRequest) -> None:
    """Raise `UsageError` when a machine that goes on running cannot serve the request."""
    if request.keep_machine and request.asked_date is not None:
        raise UsageError(
            "has a date, and the clock of a machine that is to go on running is not moved",
            subject=request.name,
            hint="without --keep-machine it gets a fresh guest at its date",
        )


def find_needs(request: BuildRequest, system: str, date: datetime | None, *, environment: str = "", quirk: str = "") -> Needs:
    """What a request asks of a machine."""
    work = request.work
    return Needs(
        system=system,
        name=request.name,
        date=date,
        cpu=request.asked_cpu,
        kernel=work.kernel,
        features=frozenset(work.features),
        packages=frozenset(re.split("[:=]", package)[0] for package in (request.recipe.packages if request.recipe else ())),
        debian=request.debian is not None,
        network=work.network,
        memory_mib=work.memory_size,
        disk=work.disk_size,
        environment=environment,
        machine=request.machine,
        prefer=request.prefer,
        keep_machine=request.keep_machine,
        quirk=quirk,
    )


async def find_work(
    request: BuildRequest, system: str, sent: Path, shop: Workshop, tell: Progress, *, fresh: bool = False
) -> Work:
    """Fetch the sources, resolve what the package needs, find the date.  Nothing has been booted yet.

    Args:
        sent: the tar that came with the request.
        fresh: with the newest package lists.
    Raises:
        OffloadError: the package or a source is not there, or cannot be built for this system.
    """
    if request.debian is not None:
        found = await prepare_debian(request.debian, system, sent=sent, cache=shop.paths.cache, progress=tell, fresh=fresh)
        recipe, sources, version = found.recipe, found.sources, found.version
        released: ReleaseDate | None = found.released
    else:
        assert request.recipe is not None
        recipe, version = request.recipe, request.recipe.version
        sources = tuple(await shop.sources(recipe, tell))
        released = await _released(request, sources) if request.asked_date == "auto" else None
    date, origin = _date(request, released)
    if origin:
        assert date is not None
        tell(f"the date is {format_date(date)}: {origin}", None)
    return Work(request=request, system=system, recipe=recipe, version=version, sources=sources, date=date, date_from=origin)


async def _released(request: BuildRequest, sources: tuple[Path, ...]) -> ReleaseDate | None:
    """What was fetched tells more than the directory that says how to build it."""
    if sources:
        return await trio.to_thread.run_sync(release_date_of_sources, sources)
    return ReleaseDate(request.released.date, request.released.origin) if request.released else None


def _date(request: BuildRequest, released: ReleaseDate | None) -> tuple[datetime | None, str]:
    """The date of the build, and where it comes from when it was found by itself."""
    asked = request.asked_date
    if asked != "auto":
        return asked, ""
    if released is None:
        raise UsageError("nothing says when the source was released", subject=request.name, hint="--date 2020-01-01")
    return released
