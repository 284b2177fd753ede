"""A Debian source package as a plain recipe: built as sbuild does, on every kind of machine.

What sbuild does on a build daemon: the environment has the essential packages, build-essential and the package's own build
dependencies, nothing else; the build has no network and no home directory; it is an unprivileged user's, with fakeroot where a
package asks for it.  Built are all binary packages (`dpkg-buildpackage --build=binary`), the architecture-independent ones too,
so that a build has the same packages for every architecture.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from offloadd.builder.archive import Archive, SourcePackage
from offloadd.builder.dsc import Dsc, check_architecture
from offloadd.builder.release_date import ReleaseDate, release_date_of_sources
from offloadd.builder.sent_dsc import take_sent
from offloadd.errors import NotFoundError, SourceError
from offloadd.model.recipe import BuildRecipe, DebianBuild, Requirements
from offloadd.model.system import SYSTEMS
from offloadd.process import Progress

OUTPUTS = ("*.*deb", "*.changes", "*.buildinfo")
"""The first is for .deb, .udeb and .ddeb: a pattern that matches nothing would be an error."""
BUILDER_PACKAGES = ("build-essential", "fakeroot")
"""What a build daemon has beside a package's own dependencies."""
CHECK_DEPENDS = "dpkg-checkbuilddeps"
"""In the step that fails where something is missing that no environment of ours has brought."""
_PATH_VERSION = 64
"""Characters of a version that the build directory's name has at most."""


@dataclass(frozen=True, kw_only=True)
class DebianSource:
    """A source package that is ready to be built."""

    recipe: BuildRecipe
    """Its packages are the environment's, each NAME=VERSION."""
    sources: tuple[Path, ...]
    """The .dsc and its files, which are put into the build directory."""
    released: ReleaseDate | None
    """None when nothing in it tells a date that can be believed."""
    version: str
    """With its epoch, which the recipe's version, a part of the build directory's name, has not."""


async def prepare_debian(
    build: DebianBuild,
    system: str,
    *,
    sent: Path | None,
    cache: Path,
    progress: Progress,
    mirror: str | None = None,
    fresh: bool = False,
) -> DebianSource:
    """Fetch (or take) the source package, and find out what its build needs.  Nothing of the package runs.

    What a build on the Hurd needs is found there: its packages come from other archives than Linux's.

    Args:
        system: a system type; the host need not be able to run it.
        sent: the tar that came with the request, which holds the .dsc and its files when `build.dsc` names one.
        cache: the folder of all caches.
        mirror: a URI; None for those of the host's apt configuration.
        fresh: ask for the newest package lists first.
    Raises:
        NotFoundError: the suite has no such package, or build dependencies cannot be met.
        NoMachineError: the package is not for this architecture.
        SourceError: what was sent is not a whole source package.
        FetchError: the mirrors cannot be reached.
        HostError: apt is missing, or the disk is full.
    """
    architecture = SYSTEMS[system].debian
    archive = Archive(cache, build.suite, mirror=mirror)
    package = await _find_package(build, archive, sent, progress, lambda dsc: check_architecture(dsc, architecture))
    packages: tuple[str, ...] = ()
    if SYSTEMS[system].kernel == "linux":
        progress(f"finding the build dependencies of {package.dsc.source} {package.dsc.version} for {architecture}", None)
        profiles = () if build.check else ("nocheck",)
        if fresh:
            await archive.refresh(architecture, progress)
        packages = await archive.resolve(package.dsc, package.files[0], architecture, profiles=profiles, progress=progress)
    released = await trio.to_thread.run_sync(_released, package)
    return DebianSource(
        recipe=make_recipe(build, package.dsc, package.files[0].name, system, packages, released),
        sources=package.files,
        released=released,
        version=package.dsc.version,
    )


async def _find_package(
    build: DebianBuild, archive: Archive, sent: Path | None, progress: Progress, check: Callable[[Dsc], None]
) -> SourcePackage:
    if build.dsc is None:
        package = await archive.fetch(build.package, build.version, progress, check=check)
        check(package.dsc)
        return package
    if sent is None:
        raise SourceError("did not come with the request", subject=build.dsc)
    package = await trio.to_thread.run_sync(take_sent, sent, build.dsc, archive.kept)
    if package.dsc.source != build.package or build.version not in (None, package.dsc.version):
        asked = f"{build.package} {build.version or ''}".rstrip()
        raise SourceError(f"is of {package.dsc.source} {package.dsc.version}, not of {asked}", subject=build.dsc)
    check(package.dsc)
    return package


def _released(package: SourcePackage) -> ReleaseDate | None:
    try:
        return release_date_of_sources(package.files)
    except NotFoundError:
        return None


def make_recipe(
    build: DebianBuild, dsc: Dsc, dsc_name: str, system: str, packages: tuple[str, ...], released: ReleaseDate | None
) -> BuildRecipe:
    """The recipe of a source package whose .dsc and files lie in the build directory."""
    requirements = {name: getattr(build, name) for name in Requirements.model_fields}
    return BuildRecipe(
        name=dsc.source,
        # A colon in a directory's name breaks every search path that it is put into.
        version=dsc.version_without_epoch[:_PATH_VERSION],
        suite=build.suite,
        packages=packages,
        steps=make_steps(build, dsc, dsc_name, check_depends=SYSTEMS[system].kernel != "linux"),
        outputs=OUTPUTS,
        env=make_environment(build, released),
        systems=(system,),
        **requirements,
    )


def make_steps(build: DebianBuild, dsc: Dsc, dsc_name: str, *, check_depends: bool = False) -> tuple[str, ...]:
    """Unpack, then build; results lie beside the unpacked source, where the patterns of the outputs look.

    Args:
        check_depends: whether it has to be seen first that what the build needs is there.
    """
    directory = shlex.quote(dsc.directory)
    words = list(dict.fromkeys((*build.build_options, *(() if build.check else ("nocheck",)))))
    if not any(word.startswith("parallel=") for word in words):
        words.append("parallel=$(nproc)")
    return (
        # Checked on the host.  Files from the guest's future, and what patches have touched, would have make complain.
        f"dpkg-source --no-check --extract {shlex.quote(dsc_name)} {directory}"
        f' && find {directory} -newermt "@$(date +%s)" -exec touch --no-dereference {{}} +',
        *([f"cd {directory} && {CHECK_DEPENDS}"] if check_depends else []),
        f'cd {directory} && DEB_BUILD_OPTIONS="{" ".join(words)}" dpkg-buildpackage --build=binary --no-sign',
    )


def make_environment(build: DebianBuild, released: ReleaseDate | None) -> dict[str, str]:
    """The variables of a build daemon's builds."""
    env = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/nonexistent"}
    if not build.check:
        env["DEB_BUILD_PROFILES"] = "nocheck"
    # dpkg-buildpackage would find the same in debian/changelog; unpacking needs it before that.
    if released is not None and released.origin.startswith("debian/changelog"):
        env["SOURCE_DATE_EPOCH"] = str(int(released.date.timestamp()))
    return env
