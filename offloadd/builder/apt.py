"""A private apt: settings, lists and caches of its own in one folder, so that the host's apt neither changes nor interferes.

    <folder>/apt.conf      named by APT_CONFIG; of the host's configuration only what `read_apt_options` gives is taken over
    <folder>/sources.list  the mirrors of one suite, either their packages for one architecture or their source packages
    <folder>/status        the packages of an empty environment, so that apt tells what is needed beside them
    <folder>/updated       its time is that of the last `apt-get update`
    <folder>/lock          locked (flock) exclusively for an update, shared for everything else

Sources: apt.conf(5), sources.list(5), apt-patterns(7).  It needs no root, and runs nothing of any package.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

import trio

from offloadd.debian import Mirror, find_mirrors, left_out, read_apt_options, without_broken
from offloadd.errors import FetchError, HostError, NotFoundError, OffloadError
from offloadd.process import Progress, host_error, program_environment, run_program

MAX_AGE_S = 3600.0
"""How old the lists may be when a question is asked."""
_JUST_UPDATED_S = 60.0
"""Lists of this age are not fetched again when they do not have what is asked for."""
# A thread that waits in flock() cannot be cancelled, so the lock is asked for again and again.
_LOCK_RETRY_S = 0.1
_KEYRINGS = (Path("/etc/apt/trusted.gpg.d"), Path("/usr/share/keyrings"))

_INSTALL = re.compile(r"Inst (?P<name>[a-z0-9][a-z0-9+.-]+) (?:\[[^]]*\] )?\((?P<version>\S+) ")
_UNKNOWN = re.compile(
    r"E: (?:Unable to find a source package for|Can not find version|Unable to locate package|Version '.*' for) "
)
_UNREACHABLE = re.compile(r"(?:E|W): (?:Failed to fetch|Some index files failed)|E: Unable to fetch")
_NO_SUITE = re.compile(r"E: The repository '.*' (?:does not have|no longer has) a Release file")
_UNMET = "The following packages have unmet dependencies:"

_CONF = """\
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "{folder}/trusted.gpg.d";
Dir::State "{folder}";
Dir::State::lists "{folder}/lists/";
Dir::State::status "{folder}/status";
Dir::State::extended_states "{folder}/extended_states";
Dir::Cache "{folder}";
Dir::Cache::archives "{folder}/archives/";
Dir::Log "{folder}";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Build-Essential {{ "build-essential"; "fakeroot"; }};
APT::Install-Recommends "false";
// The folder is ours alone: apt's own user could not write there.
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
"""


class PrivateApt:
    """The apt of one suite: its packages for `architecture` (Debian's name), or its source packages when that is None.

    Args:
        root: a folder for all private apts; this one makes its own below it when it is first asked.
        mirror: a URI; None for those of the host's apt configuration.
    """

    def __init__(self, root: Path, suite: str, architecture: str | None, *, mirror: str | None = None) -> None:
        self.suite = suite
        self.folder = root / f"{suite}-{architecture or 'source'}"
        self._architecture = architecture
        self._mirror = mirror

    async def ask(self, argv: Sequence[str], progress: Progress, *, cwd: Path | None = None) -> list[str]:
        """What a program of apt's prints, both streams; it is asked again after an update when it does not know a name.

        Raises:
            NotFoundError: there is no such package or version, or dependencies cannot be met; `detail` has apt's words.
            FetchError: the mirrors cannot be reached.
            HostError: apt is missing or does not work.
        """
        await self.refresh(progress, MAX_AGE_S)
        try:
            return await self._ask_once(argv, cwd)
        except (NotFoundError, FetchError):
            # Lists that are an hour old name files that the mirror has replaced.
            if not await self.refresh(progress):
                raise
            return await self._ask_once(argv, cwd)

    async def refresh(self, progress: Progress, max_age_s: float = _JUST_UPDATED_S) -> bool:
        """Update the lists unless they are younger than `max_age_s`; whether they are others than before.

        Raises:
            NotFoundError: the suite, or the suite for this architecture, does not exist.
            FetchError, HostError: as `ask`.
        """
        if self._age() < max_age_s:
            return False
        await trio.to_thread.run_sync(self._make_folders)
        async with self._locked(fcntl.LOCK_EX):
            # Another process may have done it while this one waited.
            if self._age() >= max_age_s:
                progress(f"reading the package lists of {self.folder.name}", None)
                await self._update(progress)
        return True

    async def index_files(self) -> list[Path]:
        """The lists as apt keeps them, which is uncompressed."""
        identifier = "Packages" if self._architecture else "Sources"
        lines = await self._run(["apt-get", "indextargets", "--format", "$(FILENAME)", f"Identifier: {identifier}"])
        return [Path(line) for line in lines if line.startswith("/")]

    async def _ask_once(self, argv: Sequence[str], cwd: Path | None) -> list[str]:
        async with self._locked(fcntl.LOCK_SH):
            return await self._run(argv, cwd=cwd)

    def _age(self) -> float:
        try:
            age = time.time() - (self.folder / "updated").stat().st_mtime
        except OSError:
            return float("inf")
        # A file from the future tells nothing.
        return age if age >= 0 else float("inf")

    def _make_folders(self) -> None:
        try:
            for name in ("lists/partial", "archives/partial", "trusted.gpg.d"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise host_error(exc, "apt", self.folder) from exc

    async def _update(self, progress: Progress) -> None:
        mirrors = await find_mirrors(self.suite, override=self._mirror)
        options = await read_apt_options()
        fresh = await self._update_from(mirrors, options, progress)
        if not await self.index_files():
            raise NotFoundError(f"the mirrors do not have {self.suite} for {self._architecture or 'sources'}", subject="apt")
        if self._architecture:
            await self._write_status()
        # Old lists are better than none; but then the next question asks for new ones again.
        if fresh:
            (self.folder / "updated").touch()

    async def _update_from(self, mirrors: Sequence[Mirror], options: Sequence[str], progress: Progress) -> bool:
        """Fetch the lists; False when some could not be fetched, but there are older ones."""
        said: list[str] = []
        try:
            await trio.to_thread.run_sync(self._write_settings, mirrors, options)
            await self._run(["apt-get", "update", "--quiet", "-o", "APT::Update::Error-Mode=any"], lines=said)
        except FetchError:
            usable = without_broken(mirrors, self.suite, said)
            if len(usable) < len(mirrors):
                progress(left_out(mirrors, usable, self._architecture or "sources"), None)
                return await self._update_from(usable, options, progress)
            if not await self.index_files():
                raise
            return False
        return True

    def _write_settings(self, mirrors: Iterable[Mirror], options: Iterable[str]) -> None:
        kind: Literal["deb", "deb-src"] = "deb" if self._architecture else "deb-src"
        sources = "".join(f"{mirror.line(kind)}\n" for mirror in mirrors)
        try:
            (self.folder / "status").touch()
            (self.folder / "sources.list").write_text(sources)
            conf = _CONF.format(folder=self.folder, architecture=self._architecture or "amd64")
            (self.folder / "apt.conf").write_text(conf + "".join(f"{option}\n" for option in options))
            for keyring in _find_keyrings():
                link = self.folder / "trusted.gpg.d" / keyring.name
                link.unlink(missing_ok=True)
                link.symlink_to(keyring)
        except OSError as exc:
            raise host_error(exc, "apt", self.folder) from exc

    async def _write_status(self) -> None:
        """Say that the packages of an empty environment (mmdebstrap's variant `minbase`) are installed."""
        await trio.to_thread.run_sync((self.folder / "status").write_text, "")
        installed = await self._run(["apt-get", "--simulate", "install", "?essential", "?priority(required)", "apt"])
        stanzas = await self._run(["apt-cache", "show", *parse_installs(installed)])
        await trio.to_thread.run_sync((self.folder / "status").write_text, as_installed(stanzas))

    async def _run(self, argv: Sequence[str], *, cwd: Path | None = None, lines: list[str] | None = None) -> list[str]:
        """What a program prints; also added to `lines` while it runs."""
        lines = [] if lines is None else lines
        env = program_environment({"APT_CONFIG": str(self.folder / "apt.conf")})
        try:
            await run_program(argv, on_line=lines.append, env=env, cwd=cwd, subject="apt", disk=self.folder)
        except HostError as exc:
            if refused := explain(lines, self.suite):
                raise refused from exc
            raise
        return lines

    @asynccontextmanager
    async def _locked(self, how: int) -> AsyncIterator[None]:
        try:
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise host_error(exc, "apt", self.folder) from exc
        try:
            while True:
                try:
                    fcntl.flock(lock, how | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await trio.sleep(_LOCK_RETRY_S)
            yield
        finally:
            os.close(lock)


def drop_old_lists(root: Path, max_age_s: float) -> None:
    """Empty the lists that nobody has updated for `max_age_s`; they take some 100 MB each.  Blocks.

    Args:
        root: the folder of all private apts.
    """
    for updated in root.glob("*/updated"):
        with suppress(OSError), (updated.parent / "lock").open("r+") as lock:
            # Somebody who uses them just now keeps them.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - updated.stat().st_mtime > max_age_s:
                updated.unlink()
                for folder in ("lists", "archives"):
                    shutil.rmtree(updated.parent / folder, ignore_errors=True)


def _find_keyrings() -> list[Path]:
    """Those that apt trusts for every source, and Debian's own, for sources that name no keyring."""
    trusted, shipped = _KEYRINGS
    return [
        *sorted(trusted.glob("*.gpg")),
        *sorted(trusted.glob("*.asc")),
        *sorted(shipped.glob("debian-*archive-keyring.gpg")),
    ]


def parse_installs(lines: Iterable[str]) -> list[str]:
    """What `apt-get --simulate` would install, as sorted NAME=VERSION."""
    return sorted({f"{match['name']}={match['version']}" for line in lines if (match := _INSTALL.match(line))})


def as_installed(lines: Iterable[str]) -> str:
    """dpkg's status file in which the packages that `apt-cache show` printed are installed, each once."""
    seen: set[str] = set()
    stanzas = []
    for stanza in "\n".join(lines).split("\n\n"):
        first = stanza.strip("\n").partition("\n")[0]
        if first.startswith("Package: ") and first not in seen:
            seen.add(first)
            stanzas.append(f"{stanza.strip()}\nStatus: install ok installed\n")
    return "\n".join(stanzas)


def explain(lines: Sequence[str], suite: str) -> OffloadError | None:
    """The error that apt's last words tell of, None when they tell of none that we know."""
    said = "\n".join(line for line in lines if re.match(r"[EW]: ", line))
    if any(_NO_SUITE.match(line) for line in lines):
        return NotFoundError(f"the mirrors have no suite {suite}", subject="apt", hint="see `suite`", detail=said)
    if any(_UNREACHABLE.match(line) for line in lines):
        return FetchError("the mirrors do not give what is asked of them", subject="apt", detail=said)
    if any(_UNKNOWN.match(line) for line in lines):
        return NotFoundError("apt does not know the package", subject="apt", detail=said)
    if _UNMET in lines:
        unmet = lines[lines.index(_UNMET) + 1 :]
        words = [line.strip() for line in unmet if line.startswith(" ")]
        return NotFoundError("dependencies cannot be met", subject="apt", detail="\n".join(words))
    return None
