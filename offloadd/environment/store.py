"""The environments that were made."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from offloadd.cache import Cache
from offloadd.digest import sparse_sha256
from offloadd.environment.build import DISK, MANIFEST, build_environment
from offloadd.environment.recipe import EnvironmentRecipe
from offloadd.environment.root import RootStore
from offloadd.errors import ImageError, NotFoundError, UsageError
from offloadd.process import Progress, silent

_RETRY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One environment on the disk."""

    digest: str
    path: Path
    """The squashfs file."""
    packages: Mapping[str, str]
    """Name -> version of everything inside."""
    recipe: EnvironmentRecipe
    made: str
    size: int
    sparse_sha256: str

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "path": str(self.path),
            "recipe": self.recipe.to_json(),
            "packages": dict(self.packages),
            "made": self.made,
            "size": self.size,
        }


class EnvironmentStore:
    """The environments under `root`, each in a directory named by its digest.

    Args:
        mirror: a URI of a Debian mirror; None for those of the host's apt configuration.
        roots: where they are unpacked for this host; by default `roots` beside `root`.
    """

    def __init__(self, root: Path, *, mirror: str | None = None, roots: RootStore | None = None) -> None:
        self.roots = roots or RootStore(root.with_name("roots"))
        self._cache = Cache(root, subject="environment", error=ImageError)
        self._mirror = mirror
        self._checked: set[tuple[str, int, int]] = set()

    async def ensure(self, recipe: EnvironmentRecipe, progress: Progress = silent, *, rebuild: bool = False) -> Environment:
        """The environment of `recipe`, made when it is missing, damaged, or anyway with `rebuild`.

        Raises:
            HostError: the host lacks a program.
            ImageError: it could not be made.
        """

        async def make(target: Path) -> None:
            await build_environment(recipe, self._mirror, target, progress)

        found = self.find(recipe.digest)
        again = rebuild or (self._cache.find(recipe.digest) is not None and (found is None or not await self._whole(found)))
        path = await self._cache.ensure(recipe.digest, make, progress, again=again)
        environment = _load(path)
        if environment is None:
            raise ImageError("its manifest cannot be read", subject=str(recipe), hint=f"remove {path}")
        return environment

    @asynccontextmanager
    async def open(self, recipe: EnvironmentRecipe, progress: Progress = silent) -> AsyncIterator[Environment]:
        """As `ensure`; until the block is left nobody removes the environment or makes it anew."""
        while True:
            environment = await self.ensure(recipe, progress)
            with self._cache.hold(recipe.digest) as found:
                if found is not None and self.find(recipe.digest) == environment:
                    yield environment
                    return
            await trio.sleep(_RETRY_S)

    def find(self, digest: str) -> Environment | None:
        """The environment with that digest, None when it has not been made or its manifest is damaged."""
        path = self._cache.find(digest)
        return None if path is None else _load(path)

    def digests(self) -> frozenset[str]:
        """Those of all environments; much quicker than `list`."""
        return self._cache.digests()

    def list(self) -> Sequence[Environment]:
        """All environments, the newest first."""
        return [found for entry in self._cache.list() if (found := _load(entry.path)) is not None]

    def called(self, beginning: str) -> Environment:
        """The one whose digest begins so.

        Raises:
            NotFoundError: there is none.
            UsageError: there are several.
        """
        found = sorted(digest for digest in self.digests() if beginning and digest.startswith(beginning))
        if len(found) > 1:
            raise UsageError("is the beginning of several environments", subject=beginning, detail="\n".join(found))
        environment = self.find(found[0]) if found else None
        if environment is None:
            raise NotFoundError("there is no such environment", subject=beginning, hint="offload env list")
        return environment

    async def remove(self, digest: str) -> bool:
        """Remove one and what was unpacked of it; False when there was none.

        Raises:
            NotAllowedError: a build runs in it, or somebody makes it.
        """
        await self.roots.remove(digest)
        return await self._cache.remove(digest)

    async def gc(self, keep: Collection[str]) -> Sequence[str]:
        """Remove all whose digest is not in `keep` and in which nothing runs, and what killed makers left; their digests."""
        await self.roots.gc(keep)
        return await self._cache.gc(self.roots.digests() | set(keep))

    async def _whole(self, environment: Environment) -> bool:
        """Whether it is as it was made: size each time, content once per process and when the file has changed."""
        try:
            status = environment.path.stat()
        except OSError:
            return False
        seen = (environment.digest, status.st_mtime_ns, status.st_ino)
        if status.st_size != environment.size:
            return False
        if seen not in self._checked:
            if await trio.to_thread.run_sync(sparse_sha256, environment.path) != environment.sparse_sha256:
                return False
            self._checked.add(seen)
        return True


def _load(directory: Path) -> Environment | None:
    try:
        data = json.loads((directory / MANIFEST).read_text())
        recipe = data["recipe"]
        facts = data["files"][DISK]
        return Environment(
            digest=data["digest"],
            path=directory / DISK,
            packages=data["packages"],
            recipe=EnvironmentRecipe(
                suite=recipe["suite"], architecture=recipe["architecture"], packages=tuple(recipe["packages"])
            ),
            made=data["made"],
            size=facts["size"],
            sparse_sha256=facts["sparse_sha256"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
