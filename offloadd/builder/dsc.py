"""Debian source control files (.dsc): what one says, and which architectures it is for.

Sources: dsc(5), deb822(5); Debian Policy 11.1 and dpkg-architecture(1) for architecture wildcards.  A .dsc may come from
anybody: nothing in it is believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from offloadd.errors import NoMachineError, SourceError
from offloadd.model.system import find_system

MAX_DSC_BYTES = 1024**2
_MAX_FILES = 1000

_FIELD = re.compile(r"(?P<name>[!-9;-~]+):(?P<value>.*)")
_FILE = re.compile(r"(?P<sha256>[0-9a-f]{64}) (?P<size>\d{1,15}) (?P<name>\S+)")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.~_:-]{0,254}")
_SOURCE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,63}")
_VERSION = re.compile(r"(?:\d{1,9}:)?[A-Za-z0-9][A-Za-z0-9.+~-]{0,99}")
_ARCHITECTURE = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,3}")
_BEGIN_SIGNED, _BEGIN_SIGNATURE = "-----BEGIN PGP SIGNED MESSAGE-----", "-----BEGIN PGP SIGNATURE-----"

# dpkg's tupletable: architectures whose CPU or ABI (first part of the tuple abi-libc-os-cpu) is not called like themselves.
_CPUS = {"armhf": "arm", "hurd-i386": "i386", "hurd-amd64": "amd64"}
_ABIS = {"armhf": "eabihf", "mips64el": "abi64"}


@dataclass(frozen=True, kw_only=True)
class DscFile:
    """One of the files that a .dsc lists."""

    name: str
    """Without a slash, not beginning with a dot."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Dsc:
    """A .dsc."""

    source: str
    version: str
    """With its epoch."""
    architectures: tuple[str, ...]
    """Names and wildcards."""
    files: tuple[DscFile, ...]
    build_depends: tuple[str, ...] = ()
    """What has to be installed to build it, of all three kinds: dependencies in the words of Debian Policy 7.1, not checked."""

    @property
    def version_without_epoch(self) -> str:
        """As it stands in file names."""
        return self.version.partition(":")[2] or self.version

    @property
    def directory(self) -> str:
        """What `dpkg-source --extract` calls the unpacked source."""
        upstream = self.version_without_epoch
        return f"{self.source}-{upstream.rpartition('-')[0] or upstream}"


def parse_dsc(data: bytes, subject: str) -> Dsc:
    """The .dsc `data`, with or without a signature, which is not checked here.

    Raises:
        SourceError: about `subject`: it is not a .dsc, or it names files that could lie outside of its own directory.
    """
    if len(data) > MAX_DSC_BYTES:
        raise SourceError(f"is larger than {MAX_DSC_BYTES >> 20} MiB, which no .dsc is", subject=subject)
    try:
        fields = _fields(data.decode())
        version = fields["version"]
        architectures = fields["architecture"].split()
        named = _SOURCE.fullmatch(fields["source"]) and _VERSION.fullmatch(version)
        if not named or not architectures or not all(_ARCHITECTURE.fullmatch(name) for name in architectures):
            raise ValueError("the source's name, version or architecture is not of Debian's form")
        return Dsc(
            source=fields["source"],
            version=version,
            architectures=tuple(architectures),
            files=tuple(_files(fields["checksums-sha256"])),
            build_depends=tuple(_dependencies(fields)),
        )
    except KeyError as exc:
        raise SourceError(f"is not a .dsc: it has no field {str(exc.args[0]).title()}", subject=subject) from exc
    except ValueError as exc:
        what = "its text is not UTF-8" if isinstance(exc, UnicodeDecodeError) else str(exc)
        raise SourceError(f"is not a .dsc: {what}", subject=subject) from exc


def _fields(text: str) -> dict[str, str]:
    """The fields of the one stanza, names in lower case, continuation lines after a newline each."""
    fields: dict[str, str] = {}
    name = ""
    for line in _stanza(text):
        if line[0] in " \t":
            if not name:
                raise ValueError("it begins with a continuation line")
            fields[name] += "\n" + line.strip()
        elif match := _FIELD.fullmatch(line):
            name = match["name"].lower()
            if name in fields:
                raise ValueError(f"it has two fields {match['name']}")
            fields[name] = match["value"].strip()
        elif not line.startswith("#"):
            raise ValueError(f"the line {line[:60]!r} is no field")
    return fields


def _stanza(text: str) -> list[str]:
    """The lines of the first stanza; of what is signed, when there is a signature."""
    lines = iter(text.split("\n"))
    found: list[str] = []
    for line in lines:
        if line.rstrip() == _BEGIN_SIGNED and not found:
            # The armor's own headers (`Hash:`) end with an empty line.
            for header in lines:
                if not header.strip():
                    break
        elif line.rstrip() == _BEGIN_SIGNATURE:
            break
        elif line.strip():
            # RFC 4880, 7.1: lines that begin with a dash are escaped.
            found.append(line.rstrip().removeprefix("- "))
        elif found:
            break
    return found


def _dependencies(fields: dict[str, str]) -> Iterator[str]:
    for kind in ("build-depends", "build-depends-arch", "build-depends-indep"):
        for word in fields.get(kind, "").split(","):
            if word.strip():
                yield " ".join(word.split())


def _files(value: str) -> Iterator[DscFile]:
    lines = [line for line in value.split("\n") if line]
    if not 0 < len(lines) <= _MAX_FILES:
        raise ValueError(f"it lists {len(lines)} files")
    names = set()
    for line in lines:
        match = _FILE.fullmatch(line)
        if match is None or not _FILE_NAME.fullmatch(match["name"]) or match["name"].endswith(".dsc"):
            raise ValueError(f"{line[:200]!r} is not a digest, a size and a plain file name")
        if match["name"] in names:
            raise ValueError(f"it lists {match['name']} twice")
        names.add(match["name"])
        yield DscFile(name=match["name"], size=int(match["size"]), sha256=match["sha256"])


def covers(wildcard: str, architecture: str) -> bool:
    """Whether `wildcard` (`any`, `linux-any`, `any-arm64`, a name) means Debian's architecture `architecture`.

    `all`, which is no architecture, covers none.
    """
    if "any" not in wildcard.split("-"):
        # dpkg takes `linux-amd64` for `amd64`.
        return wildcard.removeprefix("linux-") == architecture
    wanted = wildcard.split("-")
    # As dpkg fills up: `any` is everything, `linux-any` and `any-arm64` are (os, cpu), three parts have the libc before them.
    wanted = ["any"] * (4 - len(wanted)) + wanted
    return all(part in ("any", own) for part, own in zip(wanted, _tuple(architecture), strict=True))


def _tuple(architecture: str) -> tuple[str, str, str, str]:
    """(abi, libc, os, cpu) of an architecture that a system type of ours has."""
    system = find_system(architecture)
    os = "linux" if system.kernel == "linux" else "hurd"
    return _ABIS.get(architecture, "base"), "gnu", os, _CPUS.get(architecture, architecture)


def check_architecture(dsc: Dsc, architecture: str) -> None:
    """Refuse what could not be built.  A package that is only `all` can be built everywhere.

    Raises:
        NoMachineError: the package is not for `architecture` (Debian's name).
    """
    if set(dsc.architectures) == {"all"} or any(covers(wildcard, architecture) for wildcard in dsc.architectures):
        return
    raise NoMachineError(
        f"the package is not for {architecture}: its .dsc says `Architecture: {' '.join(dsc.architectures)}`",
        subject=f"{dsc.source} {dsc.version}",
        hint="another system type with -s",
    )
