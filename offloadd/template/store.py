"""The templates that were made, and those that are in memory."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from offloadd.cache import Cache
from offloadd.errors import ImageError, NotAllowedError, NotFoundError, UsageError
from offloadd.process import Progress, silent
from offloadd.template.freeze import MANIFEST
from offloadd.template.load import Template, load_template, read_template
from offloadd.vm.memory import SavedGuest

Make = Callable[[Path], Awaitable[None]]


@dataclass
class _Loaded:
    saved: SavedGuest
    users: int = 0
    last_used: float = field(default_factory=trio.current_time)

    def close(self) -> None:
        for fd in (self.saved.ram, self.saved.state, self.saved.frozen):
            os.close(fd)


class TemplateStore:
    """The templates under `root`, each in a directory named by its digest.

    One that is used is kept in memory, where its clones share it.
    """

    def __init__(self, root: Path) -> None:
        # Whoever loads one compares it with what was made.
        self._cache = Cache(root, subject="template", error=ImageError, durable=False)
        self._loaded: dict[str, _Loaded] = {}
        self._loading: dict[str, trio.Lock] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def is_ready(self, digest: str) -> bool:
        """Whether a clone would not have to wait for a boot."""
        return digest in self._loaded or self._cache.find(digest) is not None

    def is_loaded(self, digest: str) -> bool:
        """Whether it is in this process's memory."""
        return digest in self._loaded

    @asynccontextmanager
    async def open(self, digest: str, make: Make, progress: Progress = silent) -> AsyncIterator[SavedGuest]:
        """The template in memory for the length of the block; made by `make` when it is missing or damaged.

        Raises:
            OffloadError: it could not be made.
        """
        async with self._loading.setdefault(digest, trio.Lock()):
            loaded = self._loaded.get(digest) or await self._load(digest, make, progress)
            self._loaded[digest] = loaded
            loaded.users += 1
        self._note_use(digest)
        try:
            yield loaded.saved
        finally:
            loaded.users -= 1
            loaded.last_used = trio.current_time()
            if not loaded.users and self._loaded.get(digest) is not loaded:
                loaded.close()

    async def _load(self, digest: str, make: Make, progress: Progress) -> _Loaded:
        for again in (False, True):
            path = await self._cache.ensure(digest, make, progress, again=again)
            try:
                return _Loaded(await trio.to_thread.run_sync(_read_and_load, path))
            except ImageError as exc:
                if again:
                    raise
                progress(f"{exc}: making it anew", None)
        raise AssertionError("unreachable")

    def _note_use(self, digest: str) -> None:
        """So that those that nobody uses any more can be told from the others, by whatever process."""
        if (path := self._cache.find(digest)) is not None:
            with suppress(OSError):  # it is being removed, or the disk may not be written to
                os.utime(path / MANIFEST)

    def drop_idle(self, idle_s: float) -> Sequence[str]:
        """Give back the memory of those that nobody has used for `idle_s` seconds; their digests."""
        now = trio.current_time()
        idle = [digest for digest, one in self._loaded.items() if not one.users and now - one.last_used >= idle_s]
        for digest in idle:
            self._loaded.pop(digest).close()
        return idle

    def close(self) -> None:
        """Give back all memory; clones that run keep theirs."""
        self.drop_idle(0)

    def list(self) -> Sequence[Template]:
        """All templates, the newest first; those with a damaged manifest are left out."""
        found = []
        for entry in self._cache.list():
            try:
                found.append(read_template(entry.path))
            except ImageError:
                continue
        return found

    def digests(self) -> frozenset[str]:
        return self._cache.digests()

    def known(self) -> Sequence[dict[str, Any]]:
        """What each of them is made of (see `TemplateKey.facts`).  Cheap: its manifest is read once.  Blocks."""
        digests = self._cache.digests()
        for digest in digests - self._facts.keys():
            with suppress(ImageError):
                self._facts[digest] = read_template(self._cache.root / digest).facts
        return [self._facts[digest] for digest in digests if digest in self._facts]

    def called(self, beginning: str) -> Template:
        """The one whose digest begins so.

        Raises:
            NotFoundError: there is none.
            UsageError: there are several.
        """
        found = [template for template in self.list() if beginning and template.digest.startswith(beginning)]
        if len(found) > 1:
            names = "\n".join(template.digest for template in found)
            raise UsageError("is the beginning of several templates", subject=beginning, detail=names)
        if not found:
            raise NotFoundError("there is no such template", subject=beginning, hint="offload template list")
        return found[0]

    async def remove(self, digest: str) -> bool:
        """Remove one; clones that run are not disturbed.  False when there was none."""
        loaded = self._loaded.pop(digest, None)
        if loaded is not None and not loaded.users:
            loaded.close()
        return await self._cache.remove(digest)

    async def discard(self, saved: SavedGuest) -> None:
        """Remove the template that `saved` is of, unless it was made anew since.

        Raises:
            NotAllowedError: it is being made.
        """
        loaded = self._loaded.get(saved.digest)
        if loaded is None or loaded.saved is saved:
            await self.remove(saved.digest)

    async def drop_old(self, age_s: float, most: int) -> Sequence[str]:
        """Remove those that nobody has used for `age_s` seconds, and all but the `most` used last; their digests."""
        found = sorted(await trio.to_thread.run_sync(self.list), key=lambda template: -template.used)
        old = [template for index, template in enumerate(found) if index >= most or time.time() - template.used > age_s]
        return await self.remove_all(template.digest for template in old)

    async def remove_all(self, digests: Iterable[str]) -> Sequence[str]:
        """Remove those that nobody makes just now; the digests removed."""
        removed = []
        for digest in digests:
            with suppress(NotAllowedError):
                removed += [digest] if await self.remove(digest) else []
        return removed

    async def gc(self, keep: Collection[str], among: Collection[str] | None = None) -> Sequence[str]:
        """Remove all whose digest is not in `keep`, and what killed makers left; the digests removed.

        Args:
            among: those that may go; by default all that are there now.
        """
        removed = await self.remove_all(sorted(set(self.digests() if among is None else among) - set(keep)))
        await self._cache.sweep()
        return removed


def _read_and_load(path: Path) -> SavedGuest:
    return load_template(read_template(path))
