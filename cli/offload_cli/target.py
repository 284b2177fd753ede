"""What is to be built, from the word on the command line: a directory, a Debian package, a .dsc, a Guix package."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_cli.request import RECIPE, Request, check_directory, make_requests, read_recipe, safe_name
from offloadd.errors import NotFoundError, UsageError
from offloadd.model.asked import Asked, Changes

if TYPE_CHECKING:
    from offloadd.client import Client

_PACKAGE = re.compile(r"(?:debian:)?([a-z0-9][a-z0-9+.-]+)(?:=([A-Za-z0-9.+:~-]+))?")
_GUIX = "guix:"
_GUIX_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}(?:@([A-Za-z0-9][A-Za-z0-9+._-]{0,63}))?")
"""Guix's NAME[@VERSION]: nothing that a shell, or an option's parser, would take for something else."""


@dataclass(frozen=True, kw_only=True)
class DebianOptions:
    """Options that only make sense for Debian packages."""

    build_options: tuple[str, ...] = ()
    check: bool = True

    def given(self) -> list[str]:
        """Their names, as far as they were given."""
        return ["--build-option"] * bool(self.build_options) + ["--no-check"] * (not self.check)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is built, and what of it is sent."""

    asked: Asked
    """Without options and system types."""
    directory: Path | None = None
    """The directory that is sent."""
    files: tuple[Path, ...] = ()
    """The files that are sent, where it is no directory."""
    name: str = ""
    """For the directory of the result; empty: the recipe's name and version."""

    def pieces(self, exclude: Collection[Path]) -> Iterator[bytes]:
        """The source as a tar, in pieces."""
        from offloadd.builder.source import pack_files, pack_source

        return pack_files(self.files) if self.directory is None else pack_source(self.directory, exclude=exclude)

    def size(self, exclude: Collection[Path]) -> int:
        """About how many bytes that is."""
        from offloadd.builder.source import measure_source

        if self.directory is None:
            return sum(path.stat().st_size for path in self.files)
        return measure_source(self.directory, exclude=exclude)

    @property
    def source(self) -> Path:
        """Where the source is, which no result may replace."""
        return self.directory or (self.files[0].parent if self.files else Path("/"))

    def requests(self, client: Client, **asked: Any) -> Sequence[Request]:
        """The requests for it.

        Args:
            asked: what else is asked for: the other fields of `Asked`.
        Raises:
            ConfigError, UsageError, NotFoundError: as `make_requests`.
        """
        return make_requests(client, replace(self.asked, **asked), self.directory)


def find_target(word: str | None, changes: Changes, debian: DebianOptions) -> Target:
    """What `word` means: nothing for the current directory, a directory, `NAME[=VERSION]`, a .dsc file, `guix:NAME`.

    A directory comes before a package of the same name; `debian:NAME` and `guix:NAME` are always the package.

    Raises:
        NotFoundError, ConfigError, UsageError: it is none of these, or something about it is wrong.
    """
    path = Path(word or ".")
    if word is not None and word.endswith(".dsc") and not path.is_dir():
        return _dsc(path, changes, debian)
    if word is not None and word.startswith(_GUIX):
        return _guix(word, changes, debian)
    match = _PACKAGE.fullmatch(word or "")
    if match and not path.is_dir():
        return _package(match[1], match[2], changes, debian)
    if given := debian.given():
        raise UsageError(f"{given[0]} is for Debian packages", subject=str(path))
    if word is not None and "/" not in word and not path.exists():
        what = "there is no such directory, and no Debian package is called so"
        hint = "NAME or NAME=VERSION, in lower case" if word.lower() != word else "offload build --help"
        raise NotFoundError(what, subject=word, hint=hint)
    return _directory(check_directory(path), changes)


def _directory(directory: Path, changes: Changes) -> Target:
    file = read_recipe(directory)
    if file is None and not changes.command:
        hint = f"write one, or say what is to be run: offload build {shlex.quote(str(directory))} -- COMMAND"
        raise NotFoundError(f"holds no {RECIPE}", subject=str(directory), hint=hint)
    asked = Asked(file=file, recipe={"name": safe_name(directory.name)}, changes=changes)
    return Target(asked=asked, directory=directory)


def _package(name: str, version: str | None, changes: Changes, debian: DebianOptions) -> Target:
    asked = _debian({"package": name, "version": version}, name, changes, debian)
    return Target(asked=asked, name=f"{name}-{_plain(version)}" if version else name)


def _dsc(path: Path, changes: Changes, debian: DebianOptions) -> Target:
    from offloadd.builder.dsc import MAX_DSC_BYTES, parse_dsc

    try:
        with path.open("rb") as file:
            dsc = parse_dsc(file.read(MAX_DSC_BYTES + 1), str(path))
    except OSError as exc:
        raise NotFoundError(f"cannot be read: {exc.strerror}", subject=str(path)) from exc
    files = (path, *(path.parent / file.name for file in dsc.files))
    if missing := [file.name for file in files if not file.is_file()]:
        raise NotFoundError(f"needs {', '.join(missing)} beside it", subject=str(path), hint="dget, or apt-get source")
    asked = _debian({"package": dsc.source, "version": dsc.version, "dsc": path.name}, str(path), changes, debian)
    return Target(asked=asked, files=tuple(file.resolve() for file in files), name=f"{dsc.source}-{dsc.version_without_epoch}")


def _debian(values: dict[str, Any], subject: str, changes: Changes, debian: DebianOptions) -> Asked:
    _refuse_changes(changes, "a Debian package", subject)
    values |= {"build-options": debian.build_options, "check": debian.check, **changes.requirements}
    return Asked(debian=values)


def _guix(word: str, changes: Changes, debian: DebianOptions) -> Target:
    """A package of Guix's, built by the guest's own guix; what comes back is an archive that `guix archive --import` takes.

    The guest needs the network, for substitutes and sources.
    """
    package = word.removeprefix(_GUIX)
    match = _GUIX_PACKAGE.fullmatch(package)
    if match is None:
        raise UsageError("is no name of a Guix package", subject=word, hint="guix:NAME or guix:NAME@VERSION")
    if given := debian.given():
        raise UsageError(f"{given[0]} is for Debian packages", subject=word)
    _refuse_changes(changes, "a Guix package", word)
    values = {
        "name": safe_name(package.partition("@")[0]),
        "version": match[1] or "0",
        "steps": (f"guix build {package}", f"guix archive --export --recursive {package} > {package}.nar"),
        "outputs": (f"{package}.nar",),
        "features": ("guix",),
        "network": True,
    }
    return Target(asked=Asked(recipe=values, changes=changes), name=package.replace("@", "-"))


def _refuse_changes(changes: Changes, what: str, subject: str) -> None:
    """Raise `UsageError` for options that change a recipe."""
    for wrong, name in ((changes.command, "a command"), (changes.packages, "--package"), (changes.outputs, "--output")):
        if wrong:
            raise UsageError(f"{name} is for a directory, not for {what}", subject=subject)


def _plain(version: str) -> str:
    """A version without its epoch, as in file names."""
    return version.partition(":")[2] or version
