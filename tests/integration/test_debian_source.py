"""Debian source packages through the real apt, from the mirrors of the host."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from offloadd.builder.archive import Archive
from offloadd.builder.debian import prepare_debian
from offloadd.builder.dsc import parse_dsc
from offloadd.builder.fetch import fetch_sources
from offloadd.builder.release_date import release_date_of_directory, release_date_of_sources
from offloadd.errors import FetchError, NoMachineError, NotFoundError, SourceError
from offloadd.model.recipe import DebianBuild, Source
from offloadd.process import silent

NOWHERE = "http://127.0.0.1:9/debian"
"""A mirror that refuses every connection."""
DSC = """\
Format: 3.0 (native)
Source: foo
Binary: foo
Architecture: {architecture}
Version: 1
Maintainer: X <x@example.org>
Build-Depends: {needs}
Checksums-Sha256:
 {digest} {size} foo_1.tar.gz
Files:
 6cd0ffea3884a4e79330338dcc2987d6 {size} foo_1.tar.gz
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here: the lists of an architecture are some 10 MB to fetch."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def archive(cache: Path) -> Archive:
    return Archive(cache, "bookworm")


def host_lists() -> list[tuple[str, int]]:
    folders = [Path("/var/lib/apt/lists"), Path("/var/cache/apt"), Path("/var/lib/dpkg")]
    return [(str(path), path.stat().st_mtime_ns) for folder in folders for path in sorted(folder.glob("*"))]


def write_dsc(folder: Path, *, needs: str = "make", architecture: str = "any") -> Path:
    folder.mkdir(exist_ok=True)
    content = b"not really a tarball"
    (folder / "foo_1.tar.gz").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    path = folder / "foo_1.dsc"
    path.write_text(DSC.format(needs=needs, architecture=architecture, digest=digest, size=len(content)))
    return path


def send(folder: Path, tmp_path: Path) -> Path:
    sent = tmp_path / "sent.tar"
    with tarfile.open(sent, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return sent


async def test_fetched_once_and_checked_again(archive: Archive, cache: Path) -> None:
    before = host_lists()
    package = await archive.fetch("hello", None, silent)
    assert package.dsc.source == "hello"
    assert package.files[0].name.endswith(".dsc")
    assert {path.name for path in package.files[1:]} == {file.name for file in package.dsc.files}
    assert host_lists() == before, "the host's apt has changed"
    # A version that is known needs no mirror.
    elsewhere = Archive(cache, "bookworm", mirror=NOWHERE)
    assert await elsewhere.fetch("hello", package.dsc.version, silent) == package
    damaged = package.files[-1]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"x")
    assert await archive.fetch("hello", package.dsc.version, silent) == package
    assert damaged.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "version", "hint"),
    [("helo", None, "did you mean hello"), ("libssl-dev", None, "source package openssl"), ("hello", "0.1", "it has 2.")],
)
async def test_not_found(archive: Archive, name: str, version: str | None, hint: str) -> None:
    with pytest.raises(NotFoundError, match="bookworm has no") as caught:
        await archive.fetch(name, version, silent)
    assert hint in caught.value.hint


async def test_no_such_suite(cache: Path) -> None:
    with pytest.raises(NotFoundError, match="no suite nosuchsuite"):
        await Archive(cache, "nosuchsuite").fetch("hello", None, silent)


async def test_unreachable_mirror(tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        await Archive(tmp_path, "bookworm", mirror=NOWHERE).fetch("hello", None, silent)
    assert "127.0.0.1" in caught.value.detail


async def test_lists_are_fetched_once_for_all_who_wait(tmp_path: Path) -> None:
    told: list[str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(Archive(tmp_path, "bookworm").fetch, "hello", None, lambda phase, fraction: told.append(phase))
    assert len([phase for phase in told if phase.startswith("reading the package lists")]) == 1


@pytest.mark.parametrize("system", ["x86_64-linux", "i686-linux", "aarch64-linux", "s390x-linux"])
async def test_prepare(cache: Path, system: str) -> None:
    build = DebianBuild(package="hello")
    prepared = await prepare_debian(build, system, sent=None, cache=cache, progress=silent)
    names = {package.partition("=")[0] for package in prepared.recipe.packages}
    assert all(version for _, _, version in (package.partition("=") for package in prepared.recipe.packages))
    assert {"build-essential", "debhelper", "fakeroot", "gcc", "make", "dpkg-dev"} <= names
    # What every environment has is not listed.
    assert not {"dpkg", "libc6", "coreutils", "apt"} & names
    assert prepared.released is not None
    assert prepared.released.origin == f"debian/changelog of hello {prepared.version}"
    assert prepared.released.date == datetime(2022, 12, 26, 15, 30, tzinfo=UTC)
    for step in prepared.recipe.steps:
        subprocess.run(["/bin/sh", "-n", "-c", step], check=True)


async def test_unmet_build_dependencies(archive: Archive, tmp_path: Path) -> None:
    path = write_dsc(tmp_path / "foo", needs="make (>= 99), nosuchpackage | othernosuch")
    with pytest.raises(NotFoundError, match="build dependencies cannot be met in bookworm for amd64") as caught:
        await archive.resolve(parse_dsc(path.read_bytes(), path.name), path, "amd64", progress=silent)
    assert "foo : Depends: make (>= 99)" in caught.value.detail
    assert "nosuchpackage" in caught.value.detail
    assert str(tmp_path) not in caught.value.detail


async def test_profile_nocheck(archive: Archive, tmp_path: Path) -> None:
    path = write_dsc(tmp_path / "foo", needs="make, nosuchpackage <!nocheck>")
    dsc = parse_dsc(path.read_bytes(), path.name)
    assert await archive.resolve(dsc, path, "amd64", profiles=["nocheck"], progress=silent)
    with pytest.raises(NotFoundError, match="cannot be met"):
        await archive.resolve(dsc, path, "amd64", progress=silent)


async def test_sent_dsc(cache: Path, tmp_path: Path) -> None:
    write_dsc(tmp_path / "foo")
    sent = send(tmp_path / "foo", tmp_path)
    build = DebianBuild(package="foo", dsc="foo_1.dsc")
    prepared = await prepare_debian(build, "x86_64-linux", sent=sent, cache=cache, progress=silent)
    assert [path.name for path in prepared.sources] == ["foo_1.dsc", "foo_1.tar.gz"]
    # The tarball is none, so nothing tells a date: no reason not to build.
    assert prepared.released is None
    with pytest.raises(SourceError, match="is of foo 1, not of bar"):
        await prepare_debian(
            DebianBuild(package="bar", dsc="foo_1.dsc"), "x86_64-linux", sent=sent, cache=cache, progress=silent
        )


async def test_excluded_architecture_needs_no_mirror(tmp_path: Path) -> None:
    write_dsc(tmp_path / "foo", architecture="amd64 all")
    sent = send(tmp_path / "foo", tmp_path)
    build = DebianBuild(package="foo", dsc="foo_1.dsc")
    with pytest.raises(NoMachineError, match="not for arm64"):
        await prepare_debian(build, "aarch64-linux", sent=sent, cache=tmp_path, progress=silent, mirror=NOWHERE)


async def test_on_the_hurd_dependencies_are_the_guests_affair(tmp_path: Path) -> None:
    write_dsc(tmp_path / "foo", needs="nosuchpackage", architecture="hurd-any")
    sent = send(tmp_path / "foo", tmp_path)
    build = DebianBuild(package="foo", dsc="foo_1.dsc")
    for system in ("i586-gnu", "x86_64-gnu"):
        prepared = await prepare_debian(build, system, sent=sent, cache=tmp_path, progress=silent, mirror=NOWHERE)
        assert prepared.recipe.packages == ()
        assert [path.name for path in prepared.sources] == ["foo_1.dsc", "foo_1.tar.gz"]
        assert "dpkg-buildpackage" in prepared.recipe.steps[-1]
    with pytest.raises(NoMachineError, match="not for amd64"):
        await prepare_debian(build, "x86_64-linux", sent=sent, cache=tmp_path, progress=silent, mirror=NOWHERE)


async def test_source_of_a_recipe(archive: Archive) -> None:
    paths = await fetch_sources([Source(debian="hello")], archive, lambda name, have, size: None)
    assert paths[0].name.startswith("hello_2")
    assert paths[0].name.endswith(".dsc")
    found = await trio.to_thread.run_sync(release_date_of_sources, paths)
    assert found.date.year == 2022


def test_commit_date(tmp_path: Path) -> None:
    date = "2021-05-04T03:02:01Z"
    who = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = os.environ | who | {"GIT_COMMITTER_DATE": date, "GIT_AUTHOR_DATE": date, "HOME": str(tmp_path)}
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    (project / "sub/a").write_text("a")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "one"]):
        subprocess.run(["git", *command], cwd=project, env=env, check=True)
    moment = datetime(2021, 5, 4, 3, 2, 1, tzinfo=UTC)
    assert release_date_of_directory(project) == (moment, "the last commit")
    assert release_date_of_directory(project / "sub") == (moment, "the last commit")
    # What no commit knows has only its files' times.
    (project / "new").mkdir()
    (project / "new/a").write_text("a")
    os.utime(project / "new/a", (1e9, 1e9))
    assert release_date_of_directory(project / "new").date == datetime.fromtimestamp(1e9, UTC)
