"""What machines and builds need beforehand: a plan with its image, an environment's disk, fetched sources."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from offloadd.bridge import Bridge, open_bridge
from offloadd.builder.archive import Archive
from offloadd.builder.fetch import MAX_SOURCE_BYTES, fetch_sources
from offloadd.config.library import Library
from offloadd.config.shelf import Shelf
from offloadd.environment.store import EnvironmentStore
from offloadd.guest.secret_root import SecretRoot, secrets_of
from offloadd.host import native_systems
from offloadd.image.disk_file import find_file
from offloadd.image.own_disk import own_disk
from offloadd.image.store import Image, ImageStore
from offloadd.model.image import MAX_DISK_BYTES, FileImage
from offloadd.model.machine import VmMachine
from offloadd.model.quantity import format_size
from offloadd.model.recipe import DEFAULT_SUITE, BuildRecipe, Source
from offloadd.model.system import SYSTEMS
from offloadd.paths import Paths, make_private
from offloadd.plan.machine import BootFiles, QemuFacts, VmPlan, default_qemu, plan_vm
from offloadd.process import Progress
from offloadd.store.database import Database, open_database
from offloadd.template.store import TemplateStore
from offloadd.vm.accelerator import find_accelerator, known_accelerator
from offloadd.vm.pinning import Cores
from offloadd.vm.qemu import find_qemu
from offloadd.vm.tsc import host_tsc_khz


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """The daemon's lasting things, handed to whoever works with them."""

    paths: Paths
    shelf: Shelf
    bridge: Bridge
    database: Database
    images: ImageStore
    environments: EnvironmentStore
    templates: TemplateStore
    cores: Cores

    def library(self) -> Library:
        """What is declared now: a change of a file needs no restart."""
        return self.shelf.library()

    async def image(self, library: Library, name: str, progress: Progress, *, rebuild: bool = False) -> Image:
        """The image, made when missing and checked when there; NotFoundError when nobody has said where its disk is."""
        declared, folder = library.image(name), library.folders[name]
        if isinstance(declared, FileImage):
            find = partial(self._find_disk, declared, folder, progress)
            image = await self.images.keep(declared, folder, find, progress, again=rebuild)
        else:
            image = await self.images.ensure(declared, folder, progress, rebuild=rebuild)
        await self.images.verify(image)
        return image

    async def _find_disk(self, declared: FileImage, folder: Path, progress: Progress) -> Path:
        if declared.url is None:
            return find_file(declared, folder)
        wanted = [Source(url=declared.url, sha256=declared.sha256)]
        [path] = await self._fetch(wanted, DEFAULT_SUITE, progress, max_bytes=MAX_DISK_BYTES)
        return path

    async def plan(self, machine: VmMachine, library: Library, progress: Progress) -> VmPlan:
        """Everything that the machine's QEMU needs.

        Raises:
            HostError, ImageError, NoMachineError.
            NotFoundError: its image is not set up.
        """
        binary = await find_qemu(default_qemu(machine))
        # What is wrong with the plan is told before minutes go into an image.
        facts = QemuFacts(binary=str(binary.path), version=binary.version, cpu_models=binary.cpu_models, accelerator="tcg")
        declared = library.image(machine.image)
        if isinstance(declared, FileImage):
            declared.check_set_up(machine.name)
        nothing = Path("/nonexistent")
        plan_vm(machine, facts, BootFiles(image=machine.image, digest="", disk=nothing))
        boot = await self._boot_files(machine, library, progress)
        if SYSTEMS[machine.systems[0]].qemu in {SYSTEMS[system].qemu for system in native_systems()}:
            facts = replace(facts, accelerator=await self._accelerator(binary.path, boot, progress))
        if facts.accelerator == "tcg" and SYSTEMS[machine.systems[0]].qemu == "x86_64":
            facts = replace(facts, tsc_khz=await trio.to_thread.run_sync(host_tsc_khz))
        return plan_vm(machine, facts, boot)

    async def _boot_files(self, machine: VmMachine, library: Library, progress: Progress) -> BootFiles:
        if machine.volatile:
            return (await self.image(library, machine.image, progress)).boot
        declared, folder = library.image(machine.image), library.folders[machine.image]
        return await trio.to_thread.run_sync(own_disk, declared, folder, machine.name)

    async def _accelerator(self, qemu: Path, boot: BootFiles, progress: Progress) -> str:
        known = self.paths.accelerator
        # A disk of somebody else's has its kernel inside: any other of this host's architecture shows whether KVM works.
        kernels = [boot.kernel, Path("/boot", f"vmlinuz-{os.uname().release}"), *self._own_kernels()]
        for kernel in kernels:
            if kernel is not None and os.access(kernel, os.R_OK):
                return (await find_accelerator(qemu, kernel, known, progress)).accelerator
        return known_accelerator(qemu, known)

    def _own_kernels(self) -> list[Path | None]:
        native = {SYSTEMS[system].debian for system in native_systems()}
        images = self.images.list()
        return [image.boot.kernel for image in images if getattr(image.recipe, "architecture", "") in native]

    async def sources(self, recipe: BuildRecipe, progress: Progress) -> list[Path]:
        return await self._fetch(recipe.sources, recipe.suite, progress)

    async def _fetch(
        self, sources: Sequence[Source], suite: str, progress: Progress, *, max_bytes: int = MAX_SOURCE_BYTES
    ) -> list[Path]:
        def tell(name: str, have: int, size: int | None) -> None:
            progress(f"fetching {name} ({format_size(have)})", have / size if size else None)

        return await fetch_sources(sources, Archive(self.paths.cache, suite), tell, max_bytes=max_bytes)

    def secrets(self, machine: VmMachine) -> SecretRoot:
        return secrets_of(machine, self.paths.secrets)


@asynccontextmanager
async def open_workshop(paths: Paths, database: Path) -> AsyncIterator[Workshop]:
    """A workshop whose database is the file `database`.

    Raises:
        NotAllowedError: a directory belongs to somebody else.
        HostError: the database cannot be used.
    """
    for folder in (paths.state, paths.cache, paths.builds, paths.instances, paths.logs):
        make_private(folder)
    with open_database(database) as opened:
        templates = TemplateStore(paths.cache / "templates")
        async with open_bridge() as bridge:
            try:
                yield Workshop(
                    paths=paths,
                    shelf=Shelf(paths.library),
                    bridge=bridge,
                    database=opened,
                    images=ImageStore(paths.cache / "images"),
                    environments=EnvironmentStore(paths.cache / "environments"),
                    templates=templates,
                    cores=Cores(),
                )
            finally:
                templates.close()
