"""A folder of things that are expensive to make, each kept under its digest.

    <root>/<digest>/                   a whole thing; it never changes
    <root>/.making/<digest>.<random>/  one that is being made, or what a dead maker left
    <root>/.lock/<digest>              locked (flock) while somebody makes or removes <digest>; holds the maker's pid.
                                       Shared by those who use it and must not have it taken away

The lock goes away with its process, so what lies in `.making` while its digest is not locked belongs to a dead maker.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from offloadd.errors import HostError, NotAllowedError, OffloadError, is_disk_full
from offloadd.process import Progress, full_disk, run_program, silent

_DIGEST = re.compile(r"[0-9a-f]{16,64}")
# A thread that waits in flock() cannot be cancelled, so the lock is asked for again and again.
_LOCK_RETRY_S = 0.25

Make = Callable[[Path], Awaitable[None]]
"""Fills the empty directory that it is given."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing in the cache."""

    digest: str
    path: Path
    size: int
    """Bytes on the disk (holes do not count)."""
    made: float
    """Seconds since 1970."""


class Cache:
    """See the top of the module.

    Args:
        root: made when something is put into it.
        subject: what errors call the things, e.g. `image`.
        durable: what is there is whole even after the host lost its power; where it is not, whoever asks sees to that.
    """

    def __init__(self, root: Path, *, subject: str, error: type[OffloadError] = HostError, durable: bool = True) -> None:
        self.root = root
        self._subject = subject
        self._error = error
        self._durable = durable

    def find(self, digest: str) -> Path | None:
        """The directory of `digest`, None when it has not been made."""
        path = self.root / _checked(digest)
        return path if path.is_dir() else None

    def digests(self) -> frozenset[str]:
        """Those of all whole things: quicker than `list`, which looks at every file."""
        if not self.root.is_dir():
            return frozenset()
        with os.scandir(self.root) as found:
            return frozenset(entry.name for entry in found if _DIGEST.fullmatch(entry.name))

    def list(self) -> Sequence[Entry]:
        """All whole things, the newest first."""
        if not self.root.is_dir():
            return []
        entries = [_entry(path) for path in self.root.iterdir() if _DIGEST.fullmatch(path.name) and path.is_dir()]
        return sorted(entries, key=lambda entry: (-entry.made, entry.digest))

    async def ensure(self, digest: str, make: Make, progress: Progress = silent, *, again: bool = False) -> Path:
        """The directory of `digest`; when there is none (or `again`), `make` fills it, in one process of all that want it.

        Raises:
            OffloadError: what `make` raises; of the cache's class when the disk is full.
        """
        found = self.find(digest)
        if found is not None and not again:
            return found
        try:
            before = self._identify(digest)
            await trio.to_thread.run_sync(self._make_folders)
            async with self._lock(digest, progress):
                found = self.find(digest)
                # Whoever had the lock may have made it, or only used what is there.
                if found is not None and (not again or self._identify(digest) != before):
                    return found
                await self.sweep(locked=digest)
                return await self._make(digest, make)
        except OSError as exc:
            raise self._map(exc) from exc

    def _identify(self, digest: str) -> tuple[int, int] | None:
        """What tells the directory of `digest` from one that is made in its place; None: there is none."""
        try:
            about = (self.root / digest).stat()
        except FileNotFoundError:
            return None
        return about.st_ino, about.st_ctime_ns

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path | None]:
        """Keep `digest` from being removed or made anew until the block is left, by whatever process.

        The value is its directory; None: there is none, or somebody removes or makes it right now.
        """
        if self.find(digest) is None:
            yield None
            return
        self._make_folders()
        lock = self._try_lock(digest, shared=True)
        try:
            yield None if lock is None else self.find(digest)
        finally:
            if lock is not None:
                os.close(lock)

    async def remove(self, digest: str) -> bool:
        """Remove `digest`; False when there was none.

        Raises:
            NotAllowedError: somebody uses or makes it.
        """
        if self.find(digest) is None:
            return False
        try:
            await trio.to_thread.run_sync(self._make_folders)
            lock = self._try_lock(digest)
            if lock is None:
                raise NotAllowedError("is in use", subject=f"{self._subject} {digest[:12]}", hint="wait until that has ended")
            try:
                if self.find(digest) is None:
                    return False
                await self._discard(digest)
            finally:
                os.ftruncate(lock, 0)
                os.close(lock)
        except OSError as exc:
            raise self._map(exc) from exc
        return True

    async def gc(self, keep: Collection[str]) -> Sequence[str]:
        """Remove everything but `keep` and what is in use, and what dead makers left; the digests that were removed."""
        removed = []
        for digest in sorted(await trio.to_thread.run_sync(self.digests) - set(keep)):
            with suppress(NotAllowedError):
                removed += [digest] if await self.remove(digest) else []
        await self.sweep()
        return removed

    async def sweep(self, *, locked: str | None = None) -> Sequence[str]:
        """Remove what dead makers left; its names. `locked` is a digest whose lock the caller holds."""
        making = self.root / ".making"
        names = await trio.to_thread.run_sync(_names, making)
        swept = []
        for name in names:
            digest = name.split(".")[0]
            if not _DIGEST.fullmatch(digest):
                continue
            lock = None if digest == locked else self._try_lock(digest)
            if digest != locked and lock is None:
                continue
            try:
                # The name in `making` goes last: as long as it is there, the next one tries again.
                await remove_tree(_elsewhere(making / name))
                await remove_tree(making / name)
                swept.append(name)
            except HostError:
                # A leftover that cannot be removed now costs room, but is no reason not to make anything.
                continue
            finally:
                if lock is not None:
                    os.close(lock)
        return swept

    def _make_folders(self) -> None:
        for folder in (self.root, self.root / ".making", self.root / ".lock"):
            folder.mkdir(parents=True, exist_ok=True)

    async def _make(self, digest: str, make: Make) -> Path:
        making = self.root / ".making" / f"{digest}.{secrets.token_hex(4)}"
        making.mkdir()
        try:
            await make(making)
            await remove_tree(_elsewhere(making))
            if self._durable:
                await trio.to_thread.run_sync(_sync_tree, making)
            if self.find(digest) is not None:
                await self._discard(digest)
            making.rename(self.root / digest)
            _sync(self.root)
        except BaseException:
            with trio.CancelScope(shield=True), suppress(OffloadError, OSError):
                # Failing here is no loss: the next maker sweeps.
                await remove_tree(_elsewhere(making))
                await remove_tree(making)
            raise
        return self.root / digest

    async def _discard(self, digest: str) -> None:
        # Renamed first, so that nobody finds half of it.
        removed = self.root / ".making" / f"{digest}.{secrets.token_hex(4)}"
        (self.root / digest).rename(removed)
        with trio.CancelScope(shield=True):
            await remove_tree(removed)

    @asynccontextmanager
    async def _lock(self, digest: str, progress: Progress) -> AsyncIterator[None]:
        """Hold the lock of `digest`."""
        while (lock := self._try_lock(digest)) is None:
            progress(f"waiting for {self._owner(digest)} the same {self._subject}", None)
            await trio.sleep(_LOCK_RETRY_S)
        try:
            yield
        finally:
            os.ftruncate(lock, 0)
            os.close(lock)

    def _try_lock(self, digest: str, *, shared: bool = False) -> int | None:
        lock = os.open(self.root / ".lock" / digest, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if shared:
            return lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        return lock

    def _owner(self, digest: str) -> str:
        pid = (self.root / ".lock" / digest).read_text().strip()
        return f"process {pid}, which makes" if pid.isdigit() else "another process, which uses"

    def _map(self, exc: OSError) -> OffloadError:
        if is_disk_full(exc):
            return full_disk(self._subject, self.root, self._error)
        return HostError(f"{exc.strerror}: {exc.filename or self.root}", subject=self._subject)


def scratch(making: Path) -> Path:
    """A directory for a maker's large temporary files, swept with `making`.

    It lies in `making` if any user can enter there: programs in a user namespace are other users than us.
    """
    # Root works without a user namespace.
    reachable = os.geteuid() == 0 or all(folder.stat().st_mode & stat.S_IXOTH for folder in making.parents)
    path = making / "scratch" if reachable else _elsewhere(making)
    path.mkdir(mode=0o711)
    if reachable and os.geteuid() != 0:
        making.chmod(0o711)
    return path


async def remove_tree(path: Path) -> None:
    """Remove a directory tree, also one with files of the users of our user namespace; a missing one is fine.

    Raises:
        HostError: not all of it could be removed.
    """
    try:
        owner = os.lstat(path).st_uid
    except FileNotFoundError:
        return
    if owner != os.geteuid():
        raise HostError(f"{path} belongs to somebody else", subject="cache")
    # --one-file-system: a killed maker must not take a mounted /dev along.
    command = ["rm", "-rf", "--one-file-system", "--", str(path)]
    try:
        await run_program(as_mapped_root(command), subject=str(path))
    except HostError:
        await run_program(command, subject=str(path))


def as_mapped_root(argv: list[str]) -> list[str]:
    """`argv` as root: as it is for root, else in a user namespace with our subordinate ids."""
    return argv if os.geteuid() == 0 else ["unshare", "--user", "--map-auto", "--map-root-user", "--", *argv]


def _elsewhere(making: Path) -> Path:
    """Where the scratch of `making` is when other users cannot enter it; not in /tmp, which may be in memory."""
    folder = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 - the name is random and `mkdir` refuses what exists
    return Path(folder) / f"offload-{os.geteuid()}-{making.name}"


def _names(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"not a digest: {digest!r}")
    return digest


def _entry(path: Path) -> Entry:
    files = [file.lstat() for file in path.rglob("*")]
    return Entry(digest=path.name, path=path, size=sum(file.st_blocks * 512 for file in files), made=path.stat().st_mtime)


def _sync_tree(folder: Path) -> None:
    """Make what was written durable before it becomes visible. The scratch is gone by then."""
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    for parent, _, names in os.walk(folder):
        for name in names:
            if not Path(parent, name).is_symlink():
                _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
