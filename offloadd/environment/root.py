"""Environments unpacked, for builds on this host.

What a build finds here is what a VM finds on the environment's disk: the same files, modes, owners and times.  Nobody else may
look in: the programs in it that run as root are as old as the environment.

After a reboot each is unpacked anew, in a second: to have tens of thousands of files on the disk before the first build takes
far longer, and half of one after a power failure would be found by nobody.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from offloadd.cache import Cache, as_mapped_root
from offloadd.errors import ImageError
from offloadd.paths import make_private
from offloadd.process import Progress, run_program, silent

if TYPE_CHECKING:
    from offloadd.environment.store import Environment

ROOT, MANIFEST = "root", "root.json"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RETRY_S = 0.05


class RootStore:
    """The unpacked environments under `folder`, each in a directory named by the environment's digest."""

    def __init__(self, folder: Path) -> None:
        self._cache = Cache(folder, subject="unpacked environment", error=ImageError, durable=False)

    async def ensure(self, environment: Environment, progress: Progress = silent) -> Path:
        """The root directory of `environment`, unpacked when it is missing, an earlier one's, or from before a reboot.

        Somebody may remove it before it is used: see `open`.

        Raises:
            HostError: unsquashfs is missing, or the disk is full.
            ImageError: it cannot be unpacked.
        """

        async def make(target: Path) -> None:
            progress("unpacking the environment", None)
            await _unpack(environment, target)

        found = self._cache.find(environment.digest)
        if found is not None and _is_of(found, environment):
            return found / ROOT
        await trio.to_thread.run_sync(make_private, self._cache.root)
        return await self._cache.ensure(environment.digest, make, progress, again=found is not None) / ROOT

    @asynccontextmanager
    async def open(self, environment: Environment, progress: Progress = silent) -> AsyncIterator[Path]:
        """As `ensure`; until the block is left nobody removes the root or makes it anew."""
        while True:
            await self.ensure(environment, progress)
            with self._cache.hold(environment.digest) as found:
                if found is not None and _is_of(found, environment):
                    yield found / ROOT
                    return
            await trio.sleep(_RETRY_S)

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path | None]:
        """Keep one from being removed until the block is left; its root directory, None when there is none or it is going."""
        with self._cache.hold(digest) as found:
            yield None if found is None else found / ROOT

    def digests(self) -> frozenset[str]:
        """Those of all environments that are unpacked."""
        return self._cache.digests()

    async def remove(self, digest: str) -> bool:
        """Remove one; False when there was none.

        Raises:
            NotAllowedError: it is in use.
        """
        return await self._cache.remove(digest)

    async def gc(self, keep: Collection[str]) -> Sequence[str]:
        """Remove all whose digest is not in `keep` and that nobody uses; the digests removed."""
        return await self._cache.gc(keep)


async def _unpack(environment: Environment, target: Path) -> None:
    argv = ["unsquashfs", "-no-progress", "-quiet", "-dest", str(target / ROOT), str(environment.path)]
    subject = str(environment.recipe)
    await run_program(as_mapped_root(argv), subject=subject, error=ImageError, disk=target, called="unsquashfs")
    await trio.to_thread.run_sync((target / MANIFEST).write_text, json.dumps(_facts(environment)) + "\n")


def _facts(environment: Environment) -> dict[str, str]:
    """What makes an unpacked root the right one: the same recipe, made again, gives a disk with newer packages."""
    return {"sparse_sha256": environment.sparse_sha256, "boot": BOOT_ID.read_text().strip()}


def _is_of(directory: Path, environment: Environment) -> bool:
    try:
        facts = json.loads((directory / MANIFEST).read_text())
        return bool(facts == _facts(environment) and (directory / ROOT).is_dir())
    except (OSError, ValueError):
        return False
