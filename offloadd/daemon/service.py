"""The daemon's nurseries: store and reconcile > machines > pool > builds > API.

Nesting is the start order, unnesting the stop order: no new requests, then the builds end, then the machines.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import structlog
import trio

from offloadd.builder.archive import Archive
from offloadd.config.library import Library
from offloadd.daemon.adoption import Adoption
from offloadd.daemon.builds import Builds
from offloadd.daemon.dispatch import Dispatcher
from offloadd.daemon.guests import Guests
from offloadd.daemon.machines import Machines
from offloadd.daemon.offload import Offloading
from offloadd.daemon.pool import Pool, open_pool
from offloadd.daemon.slots import Slots
from offloadd.daemon.survey import Survey
from offloadd.daemon.templates import collect_templates
from offloadd.daemon.workshop import Workshop, open_workshop
from offloadd.errors import ConfigError, NotAllowedError, NotFoundError, OffloadError
from offloadd.image.store import Image
from offloadd.model.quantity import parse_date
from offloadd.model.recipe import DEFAULT_SUITE
from offloadd.paths import Paths
from offloadd.process import Progress
from offloadd.vm.record import read_records

DRAIN_S = 10.0
"""How long builds may go on after the daemon was told to stop."""
KEEP_ENVIRONMENTS_S = 30 * 24 * 3600.0
"""An environment that no build has used for this long is garbage."""

log = structlog.get_logger()


class Service:
    """What the API works with."""

    def __init__(
        self,
        workshop: Workshop,
        guests: Guests,
        pool: Pool,
        machines: Machines,
        survey: Survey,
        builds: Builds,
        offloading: Offloading,
        nursery: trio.Nursery,
        idle_timeout_s: float,
    ) -> None:
        self.workshop = workshop
        self.guests = guests
        self.pool = pool
        self.machines = machines
        self.survey = survey
        self.builds = builds
        self.offloading = offloading
        self.nursery = nursery
        self.idle_timeout_s = idle_timeout_s
        self.pid = os.getpid()
        self.started = time.time()
        self.stopping = trio.Event()
        self._last_used = trio.current_time()

    def touch(self) -> None:
        """Somebody uses the daemon."""
        self._last_used = trio.current_time()

    def stop(self) -> None:
        """Stop politely; asked twice, builds that run get no more time."""
        if self.stopping.is_set():
            self.builds.hurry()
        self.stopping.set()

    async def wait_at_rest(self) -> None:
        """Wait until somebody stops us, then until builds and machines have ended; those who follow them still hear of it."""
        await self.stopping.wait()
        self.builds.refuse_new()
        self.machines.refuse_new()
        await self.builds.drain(DRAIN_S)
        await self.machines.stop_all()

    async def stop_when_idle(self) -> None:
        """Stop when nothing runs and nobody has asked for anything for `idle_timeout_s` (0: never)."""
        while self.idle_timeout_s:
            if len(self.machines) or len(self.builds) or len(self.offloading) or len(self.nursery.child_tasks) > 1:
                self.touch()
            rest = self._last_used + self.idle_timeout_s - trio.current_time()
            if rest <= 0:
                log.info("idle: ending")
                self.stop()
                return
            await trio.sleep(min(rest, 10))

    async def start_declared(self) -> None:
        """Start the machines with `auto-start`."""
        try:
            machines = self.workshop.library().vms
        except OffloadError as exc:
            # Whoever asks for something is told the same.
            log.error("auto-start failed", error=str(exc))
            return
        for name, machine in machines.items():
            if machine.auto_start and self.machines.find(name) is None:
                try:
                    self.survey.check_online(name)
                    await self.machines.start(name)
                except OffloadError as exc:
                    log.error("auto-start failed", machine=name, error=str(exc))

    async def release_image(self, name: str) -> None:
        """Give up what waits on the image (or on the one whose digest begins with `name`), and its templates.

        Raises:
            NotAllowedError: an instance that somebody uses runs on it.
        """
        chosen = {image.digest for image in self.workshop.images.called(name)}
        await self.pool.forget(images=chosen)
        for record in read_records(self.workshop.paths.instances):
            if record.plan.boot.digest in chosen:
                user = record.plan.instance
                hint = f"offload vm stop {user}" if record.purpose == "machine" else "wait for the build, or cancel it"
                raise NotAllowedError(f"{user} runs on it", subject=name, hint=hint)
        await self._remove_templates(chosen)

    async def build_image(self, library: Library, name: str, progress: Progress, *, rebuild: bool) -> Image:
        """The image, made when it is missing, or anew with `rebuild`: what was made of the one before is given up.

        Raises:
            HostError, ImageError, NotFoundError: as `Workshop.image`.
        """
        image = await self.workshop.image(library, name, progress, rebuild=rebuild)
        if rebuild:
            await self.pool.forget(images={image.digest})
            await self._remove_templates({image.digest})
        return image

    async def _remove_templates(self, images: Collection[str]) -> None:
        """Those of images with these digests."""
        templates = await trio.to_thread.run_sync(self.workshop.templates.list)
        mine = [template.digest for template in templates if template.facts.get("image_digest") in images]
        await self.workshop.templates.remove_all(mine)

    async def collect_garbage(self) -> dict[str, Sequence[str]]:
        """Remove images, environments and templates that nobody needs; the digests that went."""
        shop, library = self.workshop, self.workshop.library()
        keep: set[str] = set()
        for name, declared in library.images.items():
            try:
                keep.add(await shop.images.digest(declared, library.folders[name]))
            except (ConfigError, NotFoundError):  # which of those with its name it was cannot be told
                keep |= {image.digest for image in shop.images.list() if image.name == name}
        await self.pool.forget(images={clone.image for clone in self.pool.waiting()} - keep)
        keep |= {record.plan.boot.digest for record in read_records(shop.paths.instances)}
        return {
            "images": await shop.images.gc(keep),
            "environments": await self.collect_environments(),
            "templates": await self.collect_templates(),
        }

    async def collect_templates(self) -> list[str]:
        """Remove the templates that no machine would use now, or nobody used lately; the digests that went."""
        removed = await collect_templates(self.workshop)
        await self.pool.forget(templates=removed)
        return list(removed)

    async def collect_environments(self) -> Sequence[str]:
        """Remove the environments that nobody made or built in lately and that nobody uses; the digests that went."""
        environments, now = self.workshop.environments, datetime.now(UTC)
        await trio.to_thread.run_sync(Archive(self.workshop.paths.cache, DEFAULT_SUITE).drop_old_lists, KEEP_ENVIRONMENTS_S)
        known = await trio.to_thread.run_sync(environments.list)
        made = {found.digest for found in known if (now - parse_date(found.made)).total_seconds() < KEEP_ENVIRONMENTS_S}
        used = {
            row.result["environment"]
            for row in self.workshop.database.builds(limit=10_000)
            if "environment" in row.result and (row.ended is None or time.time() - row.ended < KEEP_ENVIRONMENTS_S)
        }
        return await environments.gc(made | used | environments.digests() if len(self.builds) else made | used)


@asynccontextmanager
async def open_service(paths: Paths, *, idle_timeout_s: float) -> AsyncIterator[Service]:
    """All of the daemon but its socket; leaving the block ends every build and every machine."""
    async with open_workshop(paths, paths.database) as workshop, trio.open_nursery() as machine_nursery:
        guests = Guests(workshop)
        machines = Machines(workshop, guests, machine_nursery)
        await Adoption(workshop, machines).reconcile()
        async with open_pool(guests) as pool, trio.open_nursery() as build_nursery, trio.open_nursery() as request_nursery:
            slots = Slots()
            survey = Survey(workshop, machines, slots)
            dispatcher = Dispatcher(workshop, survey, slots)
            builds = Builds(workshop, pool, machines, dispatcher, build_nursery)
            builds.reconcile()
            offloading = Offloading(workshop, machines, slots, request_nursery)
            offloading.resume()
            service = Service(workshop, guests, pool, machines, survey, builds, offloading, request_nursery, idle_timeout_s)
            request_nursery.start_soon(service.stop_when_idle)
            request_nursery.start_soon(service.start_declared)
            try:
                yield service
            finally:
                # Also when the API has failed: nothing may be left running.
                with trio.CancelScope(shield=True):
                    request_nursery.cancel_scope.cancel()
                    await builds.drain(0)
                    await machines.stop_all()
