"""What machines and builds need beforehand: a plan with its image, an environment's disk, fetched sources."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from offloadd.bridge import Bridge, open_bridge
from offloadd.builder.archive import Archive
from offloadd.builder.fetch import fetch_sources
from offloadd.config.library import Library
from offloadd.config.shelf import Shelf
from offloadd.environment.store import EnvironmentStore
from offloadd.guest.secret_root import SecretRoot, ensure_secret_root
from offloadd.host import native_systems
from offloadd.image.store import Image, ImageStore
from offloadd.model.machine import VmMachine
from offloadd.model.quantity import format_size
from offloadd.model.recipe import BuildRecipe
from offloadd.paths import Paths, make_private
from offloadd.plan.machine import BootFiles, QemuFacts, VmPlan, default_qemu, plan_vm
from offloadd.process import Progress
from offloadd.store.database import Database, open_database
from offloadd.template.store import TemplateStore
from offloadd.vm.accelerator import find_accelerator
from offloadd.vm.pinning import Cores
from offloadd.vm.qemu import find_qemu


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
        """The image, made when missing and checked when there."""
        recipe = library.image(name)
        image = await self.images.ensure(recipe, library.folders[name], progress, rebuild=rebuild)
        await self.images.verify(image)
        return image

    async def plan(self, machine: VmMachine, library: Library, progress: Progress) -> VmPlan:
        """Everything that the machine's QEMU needs.

        Raises:
            HostError, ImageError, NoMachineError.
        """
        binary = await find_qemu(default_qemu(machine))
        # What is wrong with the plan is told before minutes go into an image.
        facts = QemuFacts(binary=str(binary.path), version=binary.version, cpu_models=binary.cpu_models, accelerator="tcg")
        nothing = Path("/nonexistent")
        plan_vm(machine, facts, BootFiles(image=machine.image, digest="", kernel=nothing, initramfs=nothing, disk=nothing))
        image = await self.image(library, machine.image, progress)
        if machine.systems[0] in native_systems():
            verdict = await find_accelerator(binary.path, image.kernel, self.paths.state / "accelerator.json", progress)
            facts = replace(facts, accelerator=verdict.accelerator)
        boot = BootFiles(image=image.name, digest=image.digest, kernel=image.kernel, initramfs=image.initramfs, disk=image.disk)
        return plan_vm(machine, facts, boot)

    async def sources(self, recipe: BuildRecipe, progress: Progress) -> list[Path]:
        def tell(name: str, have: int, size: int | None) -> None:
            progress(f"fetching {name} ({format_size(have)})", have / size if size else None)

        return await fetch_sources(recipe.sources, Archive(self.paths.cache, recipe.suite), tell)

    def secrets(self, machine: VmMachine) -> SecretRoot:
        root = Path(machine.secret_root) if machine.secret_root else None
        return ensure_secret_root(machine.name, self.paths.secrets, root)


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
