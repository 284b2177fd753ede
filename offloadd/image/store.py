"""The images that were made: found, made, checked, removed."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from pydantic import ValidationError

from offloadd.cache import Cache
from offloadd.digest import sparse_sha256
from offloadd.errors import ImageError, NotFoundError
from offloadd.image import disk_file
from offloadd.image.build import DISK, INITRAMFS, KERNEL, MANIFEST, build_image
from offloadd.image.digest import Digests, image_digest, read_guest_files
from offloadd.image.disk_file import file_digest
from offloadd.image.keep import keep_file
from offloadd.model.image import IMAGE_KINDS, FileImage, ImageDeclaration, ImageRecipe
from offloadd.plan.machine import BootFiles
from offloadd.process import Progress, silent

Find = Callable[[], Awaitable[Path]]


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image on the disk."""

    name: str
    digest: str
    directory: Path
    recipe: ImageDeclaration
    kernel_version: str
    """Empty when nobody knows."""
    packages: Mapping[str, str]
    made: str
    files: Mapping[str, Mapping[str, Any]]
    """Name -> `size` (bytes) and `sparse_sha256` (see `offloadd.digest.sparse_sha256`)."""
    boot: BootFiles
    """What a machine starts from, never to be written to."""

    def size_on_disk(self) -> int:
        """Bytes; holes do not count."""
        return sum(file.stat().st_blocks * 512 for file in self.directory.iterdir())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "digest": self.digest,
            "directory": str(self.directory),
            "recipe": self.recipe.to_json(),
            "kernel_version": self.kernel_version,
            "packages": dict(self.packages),
            "disk": {"format": self.boot.disk_format, "size": self.boot.disk_size},
            "made": self.made,
            "files": {name: dict(facts) for name, facts in self.files.items()},
            "size_on_disk": self.size_on_disk(),
        }


class ImageStore:
    """The images under `root`, each in a directory named by its digest."""

    def __init__(self, root: Path) -> None:
        self._cache = Cache(root, subject="image", error=ImageError)
        self._digests = Digests()
        # What was checked by this process: file -> its (mtime, size, inode) at that time.
        self._checked: dict[Path, tuple[int, int, int]] = {}

    async def ensure(
        self, recipe: ImageRecipe, recipe_dir: Path, progress: Progress = silent, *, rebuild: bool = False
    ) -> Image:
        """The image of `recipe`, whose files lie under `recipe_dir`; made when missing, or anyway with `rebuild`.

        Raises:
            ConfigError: a file of the recipe cannot be read.
            HostError: the host lacks a program.
            ImageError: it could not be made.
        """
        if not rebuild and (found := self.find(await self.digest(recipe, recipe_dir))):
            return found
        files = await trio.to_thread.run_sync(read_guest_files, recipe, recipe_dir)
        digest = image_digest(recipe, files)

        async def make(target: Path) -> None:
            await build_image(recipe, digest, files, target, progress)

        return _load(await self._cache.ensure(digest, make, progress, again=rebuild))

    async def keep(
        self, declared: FileImage, folder: Path, find: Find, progress: Progress = silent, *, again: bool = False
    ) -> Image:
        """The image of a disk file, which is copied when it is missing, or anyway with `again`.

        Args:
            folder: that of its description.
            find: gives the file, and fetches it when that must be.
        Raises:
            ConfigError: there is no such file.
            ImageError: it is not what was declared, or no disk that a machine could boot from.
        """
        digest = await self.digest(declared, folder)

        async def make(target: Path) -> None:
            await keep_file(declared, folder, await find(), target, progress)

        return _load(await self._cache.ensure(digest, make, progress, again=again))

    async def digest(self, recipe: ImageDeclaration, recipe_dir: Path) -> str:
        """The digest that the image of `recipe` has or would have."""
        if isinstance(recipe, FileImage):
            return await trio.to_thread.run_sync(file_digest, recipe, recipe_dir)
        return await trio.to_thread.run_sync(self._digests.of, recipe, recipe_dir)

    def find(self, digest: str) -> Image | None:
        """The image with that digest, None when it has not been made. Raises ImageError when its manifest is damaged."""
        path = self._cache.find(digest)
        return None if path is None else _load(path)

    def list(self) -> Sequence[Image]:
        """All images, the newest first; those with a damaged manifest are left out."""
        images = []
        for entry in self._cache.list():
            try:
                images.append(_load(entry.path))
            except ImageError:
                continue
        return images

    def show(self, name: str) -> Image:
        """The newest image called `name`, or the one whose digest begins with it (8 digits at least).

        Raises:
            NotFoundError: there is none.
        """
        images = self.list()
        for image in images:
            if image.name == name or (len(name) >= 8 and image.digest.startswith(name)):
                return image
        known = ", ".join(sorted({image.name for image in images})) or "none"
        raise NotFoundError("no such image", subject=name, hint=f"made so far: {known}; see `offload image build`")

    async def remove(self, name: str) -> Sequence[Image]:
        """Remove every image called `name` (or the one with that digest); those removed. Raises NotFoundError."""
        chosen = self.called(name)
        for image in chosen:
            await self._cache.remove(image.digest)
        return chosen

    def called(self, name: str) -> Sequence[Image]:
        """Every image called `name`, or the one with that digest. Raises NotFoundError."""
        first = self.show(name)
        return [image for image in self.list() if image.name == name] or [first]

    async def gc(self, keep: Collection[str]) -> Sequence[str]:
        """Remove all images whose digest is not in `keep`, and what killed builds left; the digests removed."""
        return await self._cache.gc(keep)

    async def verify(self, image: Image) -> None:
        """Check that `image` is as it was made: sizes each time, contents once per process and when a file has changed.

        Raises:
            ImageError: it is damaged.
        """
        for name, facts in image.files.items():
            file = image.directory / name
            try:
                status = file.stat()
            except OSError as exc:
                raise _damaged(image, f"{name}: {exc.strerror}") from exc
            if status.st_size != facts["size"]:
                raise _damaged(image, f"{name} has {status.st_size} bytes instead of {facts['size']}")
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if self._checked.get(file) != seen:
                if await trio.to_thread.run_sync(sparse_sha256, file) != facts["sparse_sha256"]:
                    raise _damaged(image, f"the content of {name} is not what was made")
                self._checked[file] = seen


def _damaged(image: Image, what: str) -> ImageError:
    return ImageError(f"the image is damaged: {what}", subject=image.name, hint=f"offload image build --rebuild {image.name}")


def _load(directory: Path) -> Image:
    try:
        data = json.loads((directory / MANIFEST).read_text())
        return Image(
            name=data["name"],
            digest=data["digest"],
            directory=directory,
            recipe=IMAGE_KINDS[data["recipe"]["kind"]].model_validate(data["recipe"]),
            kernel_version=data["kernel_version"],
            boot=_boot_files(directory, data),
            packages=data["packages"],
            made=data["made"],
            files=data["files"],
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as exc:
        hint = "`offload image build --rebuild` makes it again"
        raise ImageError(f"its manifest cannot be read: {exc}", subject=directory.name, hint=hint) from exc


def _boot_files(directory: Path, manifest: Mapping[str, Any]) -> BootFiles:
    name, digest = manifest["name"], manifest["digest"]
    if disk := manifest.get("disk"):
        path = directory / disk_file.DISK
        return BootFiles(image=name, digest=digest, disk=path, disk_format=disk["format"], disk_size=int(disk["size"]))
    kernel, initramfs = directory / KERNEL, directory / INITRAMFS
    disk = directory / DISK
    return BootFiles(
        image=name,
        digest=digest,
        disk=disk,
        disk_size=int(manifest["files"][DISK]["size"]),
        disk_file=_file_state(disk),
        kernel=kernel,
        initramfs=initramfs,
    )


def _file_state(file: Path) -> tuple[int, int] | None:
    """None when it is gone: `ImageStore.verify` tells."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns
