"""Debian source packages of a suite: fetched and checked by apt, and what has to be installed to build one.

The files are kept by their digest (`offloadd.builder.kept`), beside those of every other source; which belong to a version is
noted in `<cache>/debian/known/NAME_VERSION`, so that a version that was fetched once needs no mirror again.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import trio

from offloadd.builder.apt import PrivateApt, drop_old_lists, parse_installs
from offloadd.builder.dsc import MAX_DSC_BYTES, Dsc, DscFile, parse_dsc
from offloadd.builder.kept import find_kept, open_partial, sweep
from offloadd.builder.source_index import read_index
from offloadd.errors import FetchError, NotFoundError, SourceError
from offloadd.model.quantity import format_size
from offloadd.process import Progress, host_error

MAX_PACKAGE_BYTES = 8 * 1024**3
"""Of all files of a source package together."""
_URI = re.compile(r"'\S+' (?P<name>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class SourcePackage:
    """A source package on the host."""

    dsc: Dsc
    files: tuple[Path, ...]
    """The .dsc, then what it lists; each under its own name."""


class Archive:
    """The source packages of `suite`.

    Args:
        cache: the folder of all caches; `sources` and `debian` below it are used.
        mirror: a URI; None for those of the host's apt configuration.
    """

    def __init__(self, cache: Path, suite: str, *, mirror: str | None = None) -> None:
        self.suite = suite
        self.kept = cache / "sources"
        self._folder = cache / "debian"
        self._mirror = mirror

    async def fetch(
        self, name: str, version: str | None, progress: Progress, *, check: Callable[[Dsc], None] = lambda dsc: None
    ) -> SourcePackage:
        """The source package `name` in `version`, by default the newest that the suite has.

        Args:
            check: raises what is wrong with the package, before more than its .dsc is fetched.
        Raises:
            NotFoundError: the suite does not have it; names that are like it are in the hint.
            FetchError: the mirrors cannot be reached.
            HostError: apt is missing, or the disk is full.
        """
        if version and (known := await trio.to_thread.run_sync(self._find_known, name, version)):
            return known
        apt = self._apt(None)
        wanted = f"{name}={version}" if version else name
        argv = ["apt-get", "source", "--quiet", "--only-source", wanted]
        try:
            listed = parse_uris(await apt.ask([*argv, "--print-uris"], progress))
            if found := await trio.to_thread.run_sync(self._find_all, listed):
                return found
            size = sum(file.size for file in listed)
            if size > MAX_PACKAGE_BYTES:
                raise SourceError(f"is larger than {format_size(MAX_PACKAGE_BYTES)}", subject=wanted)
            progress(f"fetching the source of {wanted} ({format_size(size)})", None)
            await trio.to_thread.run_sync(partial(self._folder.mkdir, parents=True, exist_ok=True))
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".fetch-", ignore_cleanup_errors=True) as folder:
                await apt.ask([*argv, "--download-only", "--dsc-only"], progress, cwd=Path(folder))
                check(await trio.to_thread.run_sync(_only_dsc, Path(folder)))
                await apt.ask([*argv, "--download-only"], progress, cwd=Path(folder))
                return await trio.to_thread.run_sync(self._keep, Path(folder), listed)
        except NotFoundError as exc:
            raise await self._not_found(apt, name, version, exc) from exc
        except OSError as exc:
            raise host_error(exc, wanted, self.kept) from exc

    async def resolve(
        self, package: Dsc, path: Path, architecture: str, *, profiles: Sequence[str] = (), progress: Progress
    ) -> tuple[str, ...]:
        """What has to be installed beside the essential packages to build `package`, as NAME=VERSION.

        That is its build dependencies of all three kinds, build-essential and fakeroot, and what they need.

        Args:
            path: its .dsc.
            architecture: Debian's name of the one to build for and on.
        Raises:
            NotFoundError: something cannot be installed; `detail` has apt's words.
            FetchError, HostError: as `fetch`.
        """
        argv = ["apt-get", "build-dep", "--quiet", "--simulate"]
        argv += [f"--build-profiles={','.join(profiles)}"] if profiles else []
        try:
            return tuple(parse_installs(await self._apt(architecture).ask([*argv, str(path)], progress)))
        except NotFoundError as exc:
            if not exc.detail:
                raise
            words = exc.detail.replace(f"builddeps:{path}", package.source)
            raise NotFoundError(
                f"build dependencies cannot be met in {self.suite} for {architecture}",
                subject=f"{package.source} {package.version}",
                detail=words,
            ) from exc

    async def refresh(self, architecture: str, progress: Progress) -> None:
        """Ask for the newest lists: what was resolved is gone from the mirrors."""
        await self._apt(architecture).refresh(progress)

    def drop_old_lists(self, max_age_s: float) -> None:
        """Of all suites; see `offloadd.builder.apt`.  Blocks."""
        drop_old_lists(self._folder / "apt", max_age_s)

    def _apt(self, architecture: str | None) -> PrivateApt:
        return PrivateApt(self._folder / "apt", self.suite, architecture, mirror=self._mirror)

    def _find_known(self, name: str, version: str) -> SourcePackage | None:
        try:
            listed = json.loads(self._note(name, version).read_text())
            return self._find_all([DscFile(**file) for file in listed])
        except (OSError, ValueError, TypeError):
            return None

    def _find_all(self, listed: Sequence[DscFile]) -> SourcePackage | None:
        """The package whose files are `listed`, their digests checked again; None when one is not kept."""
        paths = [find_kept(self.kept, file.sha256, file.name.__eq__) for file in listed]
        found = [path for path in paths if path is not None]
        return load_package(found) if found and len(found) == len(listed) else None

    def _keep(self, folder: Path, listed: Sequence[DscFile]) -> SourcePackage:
        """Take what apt has fetched, which is checked once more: against what apt said before."""
        sweep(self.kept)
        paths = []
        for file in listed:
            with open_partial(self.kept, file.name, file.sha256, max_bytes=file.size) as growing:
                growing.copy_from(folder / file.name)
                paths.append(growing.keep(file.name, "the mirror's index"))
        package = load_package(paths)
        note = self._note(package.dsc.source, package.dsc.version)
        note.parent.mkdir(exist_ok=True)
        fresh = note.with_name(f".{os.getpid()}-{note.name}")
        fresh.write_text(json.dumps([asdict(file) for file in listed]))
        fresh.replace(note)
        return package

    def _note(self, name: str, version: str) -> Path:
        return self._folder / "known" / f"{name}_{quote(version, safe='+~')}"

    async def _not_found(self, apt: PrivateApt, name: str, version: str | None, cause: NotFoundError) -> NotFoundError:
        """Say what there is instead."""
        index = await trio.to_thread.run_sync(read_index, await apt.index_files())
        if not index.versions:
            # It is the suite that does not exist.
            return cause
        if versions := index.versions.get(name):
            return NotFoundError(f"{self.suite} has no version {version}", subject=name, hint=f"it has {', '.join(versions)}")
        if source := index.sources.get(name):
            hint = f"it is a binary package of the source package {source}"
        else:
            close = difflib.get_close_matches(name, index.versions, n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(close)}?" if close else "give the name of a source package, or a .dsc"
        return NotFoundError(f"{self.suite} has no such source package", subject=name, hint=hint)


def parse_uris(lines: Iterable[str]) -> list[DscFile]:
    """The files that `apt-get source --print-uris` lists, the .dsc first."""
    matches = [match for line in lines if (match := _URI.fullmatch(line))]
    files = [DscFile(name=match["name"], size=int(match["size"]), sha256=match["sha256"]) for match in matches]
    if len([file for file in files if file.name.endswith(".dsc")]) != 1 or any("/" in file.name for file in files):
        raise FetchError("apt does not say which files belong to a source package", subject="apt")
    return sorted(files, key=lambda file: not file.name.endswith(".dsc"))


def _only_dsc(folder: Path) -> Dsc:
    (path,) = folder.glob("*.dsc")
    return parse_dsc(path.read_bytes(), path.name)


def load_package(paths: Sequence[Path]) -> SourcePackage:
    """The package whose .dsc is the first of `paths`.  Blocks.

    Raises:
        SourceError: the .dsc is none, or lists other files.
    """
    path = paths[0]
    with path.open("rb") as file:
        dsc = parse_dsc(file.read(MAX_DSC_BYTES + 1), path.name)
    if {file.name for file in dsc.files} != {path.name for path in paths[1:]}:
        raise SourceError("lists other files than came with it", subject=path.name)
    return SourcePackage(dsc=dsc, files=tuple(paths))
