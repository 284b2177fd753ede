"""Debian root file systems through mmdebstrap, from the mirrors that the host's apt uses.

Sources: sources.list(5), mmdebstrap(1).  No mirror's name is written here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from offloadd.binfmt.status import Status, find_fault, read_status
from offloadd.errors import HostError, ImageError, NotFoundError
from offloadd.host import native_systems
from offloadd.model.system import find_system
from offloadd.process import Progress, program_environment, read_program, run_program, silent

_SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
_INDEX = re.compile(r"'(?P<uri>\S+?)/dists/(?P<suite>\S+)/(?P<component>[^/]+)/binary-(?P<arch>[^/]+)/Packages[^']*'")
# What belongs to a suite: updates (`bookworm-updates`) and security fixes (`bookworm-security`, `buster/updates`).
_COMPANIONS = ("", "-updates", "-security", "/updates")
# What an apt inside a root cannot find out by itself: proxies, and how strict to be about old Release files.
_APT_OPTION = re.compile(r'Acquire::(?:\w+::Proxy(?:::\S+)?|Check-Date|Check-Valid-Until|Retries) ".*";')

_FAILED = re.compile(r"[EW]: Failed to fetch ")


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """One source of packages."""

    uri: str
    suite: str
    components: tuple[str, ...] = ("main",)
    signed_by: str = ""
    """A keyring's path; empty leaves the choice to mmdebstrap."""

    def line(self, kind: Literal["deb", "deb-src"] = "deb") -> str:
        """The source in the one-line form of sources.list(5)."""
        option = f"[signed-by={self.signed_by}] " if self.signed_by else ""
        return f"{kind} {option}{self.uri} {self.suite} {' '.join(self.components)}"


async def find_mirrors(suite: str, *, override: str | None = None) -> tuple[Mirror, ...]:
    """Where packages of `suite` come from: `override` (a URI), else the host's apt configuration.

    A suite that the host does not use is taken from the host's first Debian mirror, without updates.

    Raises:
        HostError: apt is missing or has no usable source.
    """
    if override:
        return (Mirror(uri=override.rstrip("/"), suite=suite),)
    # Unlike `apt-get indextargets`, this also answers before the first `apt-get update`; it downloads nothing.
    lines = await read_program(["apt-get", "update", "--print-uris"], subject="apt")
    texts = [file.read_text(errors="replace") for file in _source_files()]
    return choose_mirrors(suite, [replace(mirror, signed_by=find_keyring(mirror, texts)) for mirror in parse_indexes(lines)])


async def read_apt_options() -> list[str]:
    """The lines of the host's apt configuration that another apt needs to reach the same mirrors, each once.

    Raises:
        HostError: apt is missing.
    """
    dumped = await read_program(["apt-config", "dump"], subject="apt")
    return list(dict.fromkeys(line for line in dumped if _APT_OPTION.fullmatch(line)))


def parse_indexes(lines: Iterable[str]) -> list[Mirror]:
    """The sources behind what `apt-get update --print-uris` prints, in its order, each once."""
    components: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if match := _INDEX.match(line):
            known = components.setdefault((match["uri"], match["suite"]), [])
            if match["component"] not in known:
                known.append(match["component"])
    return [Mirror(uri=uri, suite=suite, components=tuple(names)) for (uri, suite), names in components.items()]


def choose_mirrors(suite: str, configured: Sequence[Mirror]) -> tuple[Mirror, ...]:
    """Those of `configured` that serve `suite`, its updates and security fixes, else the first archive with that suite put in.

    Raises:
        HostError: there is none.
    """
    wanted = {suite + companion for companion in _COMPANIONS}
    fitting = tuple(mirror for mirror in configured if mirror.suite in wanted)
    if any(mirror.suite == suite for mirror in fitting):
        return fitting
    archives = [mirror for mirror in configured if "main" in mirror.components and _is_archive(mirror)]
    if not archives:
        hint = "give the recipe a `mirror:`, or set up apt's sources"
        raise HostError(f"the host's apt has no Debian mirror for {suite}", subject="apt", hint=hint)
    archives.sort(key=lambda mirror: not mirror.uri.endswith("/debian"))
    return (replace(archives[0], suite=suite, components=("main",)),)


def without_broken(mirrors: Sequence[Mirror], suite: str, said: Iterable[str]) -> tuple[Mirror, ...]:
    """`mirrors` without those of updates and security fixes whose indexes apt could not fetch, from its messages `said`.

    All of them when `suite` itself could not be fetched.  A mirror that is being synchronized has other indexes
    than it says for some architectures: for hours, or for good.
    """
    failed = [line for line in said if _FAILED.match(line)]
    broken = [mirror for mirror in mirrors if any(f" {mirror.uri}/dists/{mirror.suite}/" in line for line in failed)]
    if any(mirror.suite == suite for mirror in broken):
        return tuple(mirrors)
    return tuple(mirror for mirror in mirrors if mirror not in broken)


def left_out(mirrors: Sequence[Mirror], usable: Sequence[Mirror], architecture: str) -> str:
    """What a user is told when only `usable` of `mirrors` are used."""
    names = ", ".join(mirror.suite for mirror in mirrors if mirror not in usable)
    return f"going on without {names}: its mirror has not what it says for {architecture}"


def _is_archive(mirror: Mirror) -> bool:
    return re.search(r"security|updates|backports|/", mirror.suite) is None and "security" not in mirror.uri


def find_keyring(mirror: Mirror, texts: Iterable[str]) -> str:
    """The keyring that the source files `texts` (deb822 or one-line) bind `mirror` to; empty when none is named.

    A key that is written into the file itself is left to mmdebstrap.
    """
    for text in texts:
        for stanza in _stanzas(text):
            if mirror.uri in stanza["uris"] and mirror.suite in stanza["suites"] and stanza["signed-by"]:
                keyring = stanza["signed-by"][0]
                return keyring if keyring.startswith("/") else ""
    return ""


def _stanzas(text: str) -> list[dict[str, list[str]]]:
    """The sources of a file: `uris` (without their last slash), `suites`, `signed-by`."""
    found = [_one_line(line) for line in text.splitlines() if re.match(r"\s*deb\s", line)]
    for block in re.split(r"\n\s*\n", text):
        fields = {"uris": "", "suites": "", "signed-by": ""}
        name = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if match := re.match(r"([A-Za-z-]+):(.*)", line):
                name = match[1].lower()
                fields[name] = match[2]
            elif name and line[:1].isspace():
                fields[name] += line
        found.append({key: fields[key].split() for key in ("uris", "suites", "signed-by")})
    return [stanza | {"uris": [uri.rstrip("/") for uri in stanza["uris"]]} for stanza in found]


def _one_line(line: str) -> dict[str, list[str]]:
    match = re.match(r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)", line)
    if match is None:
        return {"uris": [], "suites": [], "signed-by": []}
    keyring = re.search(r"signed-by=(\S+)", match["options"] or "", re.IGNORECASE)
    return {"uris": [match["uri"]], "suites": [match["suite"]], "signed-by": keyring[1].split(",") if keyring else []}


def _source_files() -> list[Path]:
    main, folder = _SOURCES
    more = [*folder.glob("*.list"), *folder.glob("*.sources")] if folder.is_dir() else []
    return [file for file in (main, *sorted(more)) if file.is_file()]


def installed_packages(status: str) -> dict[str, str]:
    """Name -> version of what dpkg's status file calls installed."""
    found = {}
    for stanza in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if re.match(r"(Package|Version|Status): ", line))
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields["Version"]
    return dict(sorted(found.items()))


async def bootstrap(
    target: Path,
    *,
    suite: str,
    architecture: str,
    packages: Sequence[str],
    mirrors: Sequence[Mirror],
    scratch: Path,
    hooks: Sequence[str] = (),
    dpkg_options: Sequence[str] = (),
    epoch: int | None = None,
    check_valid_until: bool = True,
    subject: str = "mmdebstrap",
    progress: Progress = silent,
) -> None:
    """Write a root file system (minbase and `packages`) as the tar file `target`.

    Args:
        mirrors: see `find_mirrors`.
        scratch: a directory for the unpacked root, which any user may enter.
        hooks: shell commands that run at the end as (mapped) root, with the root's path as `$1`.
        epoch: no file is newer than this (seconds since 1970), and Python's bytecode does not depend on file times.
        check_valid_until: whether an index is refused whose time has passed (a snapshot's has, and a slow mirror's of sid).

    Raises:
        HostError: mmdebstrap is missing, or nothing here runs programs of that architecture.
        NotFoundError: the suite does not have one of the packages.
        ImageError: it failed otherwise, or the disk is full.
    """
    check_runs(architecture, native_systems(), read_status(), subject)
    apt_options = await read_apt_options()
    # The host's proxies are nobody's business inside.
    tidy = 'rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap"'
    root = os.geteuid() == 0
    # As root its mounts would be the whole host's: whoever looks around there keeps them busy; they outlive a killed daemon.
    argv = ["unshare", "--mount", "--propagation=private"] if root else []
    argv += ["mmdebstrap", "--verbose", "--variant=minbase", "--format=tar"]
    argv += [f"--mode={'root' if root else 'unshare'}", f"--architectures={architecture}"]
    argv += [f"--include={','.join(packages)}"] if packages else []
    apt_options += [] if check_valid_until else ['Acquire::Check-Valid-Until "false";']
    argv += [f"--aptopt={option}" for option in apt_options]
    argv += [f"--dpkgopt={option}" for option in dpkg_options]
    argv += [f"--customize-hook={hook}" for hook in (*hooks, tidy)]
    argv += [suite, str(target)]
    # INITRD=No: Debian's own initramfs is not used, and takes longer to make than the rest of the kernel's setup.
    extra = {"TMPDIR": str(scratch), "INITRD": "No"} | ({"SOURCE_DATE_EPOCH": str(epoch)} if epoch is not None else {})
    env = program_environment(extra)
    while True:
        reader = _OutputReader(progress)
        lines = [mirror.line() for mirror in mirrors]
        try:
            await run_program(
                [*argv, *lines],
                on_line=reader.take,
                env=env,
                subject=subject,
                error=ImageError,
                disk=scratch,
                called="mmdebstrap",
            )
            break
        except ImageError as exc:
            usable = without_broken(mirrors, suite, reader.failed)
            if missing := missing_packages(exc.detail):
                hint = "`packages` in the recipe, or `suite`"
                what = f"{suite} has no {' '.join(missing)} for {architecture}"
                raise NotFoundError(what, subject=subject, hint=hint) from exc
            if len(usable) == len(mirrors) and lacks_suite(exc.detail):
                raise NotFoundError(f"the mirrors have no suite {suite}", subject=subject, hint="see `suite`") from exc
            if len(usable) == len(mirrors):
                raise
            progress(left_out(mirrors, usable, architecture), None)
            mirrors = usable
    progress("packages are installed", 1.0)


def check_runs(architecture: str, native: Collection[str], status: Status, subject: str) -> None:
    """Raise `HostError` when this host cannot run the scripts of the packages of that architecture (dpkg's name).

    mmdebstrap would find out, too, but only when it has downloaded everything, and without a word about what to do.
    """
    try:
        system = find_system(architecture)
    except ValueError:
        return  # one that Debian has and we have not
    if system.name in native:
        return
    if fault := find_fault(status, system):
        what, _, remedy = fault.partition(": ")
        raise HostError(f"programs of {architecture} do not run here: {what}", subject=subject, hint=remedy)


class _OutputReader:
    """Takes what mmdebstrap says: progress, and what could not be fetched."""

    def __init__(self, progress: Progress) -> None:
        self.failed: list[str] = []
        self._parser = ProgressParser(progress)

    def take(self, line: str) -> None:
        self._parser.line(line)
        if _FAILED.match(line):
            self.failed.append(line)


_NO_SUITE = re.compile(r"^E: The repository '[^']*' does not have a Release file", re.MULTILINE)
_NO_PACKAGE = re.compile(
    r"^E: (?:Unable to locate package |Package '|Version '\S+' for ')([^\s']+)"
    r"(?:$|' has no installation candidate|' was not found)",
    re.MULTILINE,
)


def missing_packages(said: str) -> list[str]:
    """The packages that apt does not find, from its messages (apt-private/private-cacheset.cc)."""
    return list(dict.fromkeys(_NO_PACKAGE.findall(said)))


def lacks_suite(said: str) -> bool:
    """Whether apt says that a mirror answers, and does not have the suite (apt-pkg/acquire-item.cc)."""
    return _NO_SUITE.search(said) is not None


class ProgressParser:
    """Turns the lines of `mmdebstrap --verbose` into progress.

    mmdebstrap runs apt and dpkg twice, for the essential packages and for the rest; each announces "N newly installed".
    """

    # Where the rounds begin and how long they are, measured on an image with a kernel.
    _ROUNDS = ((0.08, 0.37), (0.45, 0.45))

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._round = -1
        self._wanted = 1
        self._steps: set[tuple[str, str]] = set()
        self._last = 0.0

    def line(self, line: str) -> None:
        """Take one line of output."""
        if match := re.match(r"\d+ upgraded, (\d+) newly installed", line):
            self._round = min(self._round + 1, len(self._ROUNDS) - 1)
            self._wanted, self._steps = max(int(match[1]), 1), set()
        elif match := re.match(r"(Get:\d+|Unpacking|Setting up) (\S+)", line):
            self._step(match[1], match[2], line)
        elif line.startswith("I: creating tarball"):
            self._tell("writing the root file system", 0.93)
        elif line.startswith("I: running apt-get update"):
            self._tell("reading the package lists", 0.0)

    def _step(self, kind: str, what: str, line: str) -> None:
        if self._round < 0:
            self._tell("reading the package lists", 0.04)
            return
        key, verb = ("get", "downloading") if kind.startswith("Get") else (kind, kind.lower())
        name = line.split()[4] if key == "get" and len(line.split()) > 4 else what
        self._steps.add((key, name))
        start, length = self._ROUNDS[self._round]
        # Each package is downloaded, unpacked and set up; a download costs little.
        weight = sum(0.2 if step == "get" else 0.4 for step, _ in self._steps)
        self._tell(f"{verb} {name.split(':')[0]}", start + length * min(weight / self._wanted, 1.0))

    def _tell(self, phase: str, fraction: float) -> None:
        self._last = max(self._last, min(fraction, 1.0))
        self._progress(phase, self._last)
