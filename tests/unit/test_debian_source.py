"""Debian source packages: what apt says, what a request brings, and the recipe that it becomes."""

from __future__ import annotations

import hashlib
import io
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from offloadd.builder.apt import as_installed, explain, parse_installs
from offloadd.builder.archive import parse_uris
from offloadd.builder.debian import make_recipe
from offloadd.builder.dsc import Dsc
from offloadd.builder.release_date import ReleaseDate
from offloadd.builder.sent_dsc import take_sent
from offloadd.builder.source_index import read_index
from offloadd.errors import FetchError, NotFoundError, SourceError
from offloadd.model.recipe import BuildRecipe, DebianBuild

RELEASED = ReleaseDate(datetime(2022, 12, 26, 15, 30, tzinfo=UTC), "debian/changelog of hello 2.10-3")


def test_installs() -> None:
    lines = [
        "Building dependency tree...",
        "Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [arm64]) []",
        "Inst autoconf (2.71-3 Debian:12.15/oldstable [all])",
        "Inst tzdata [1] (2026f-0+deb12u1 Debian-Security:12/oldstable-security [all])",
        "Conf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [arm64])",
    ]
    assert parse_installs(lines) == ["autoconf=2.71-3", "libc6=2.36-9+deb12u14", "tzdata=2026f-0+deb12u1"]


def test_installed_status() -> None:
    shown = [
        "Package: a",
        "Version: 1",
        "Description: x",
        " .",
        " y",
        "",
        "Package: b",
        "Version: 2",
        "",
        "Package: a",
        "Version: 1",
    ]
    assert as_installed(shown) == (
        "Package: a\nVersion: 1\nDescription: x\n .\n y\nStatus: install ok installed\n\n"
        "Package: b\nVersion: 2\nStatus: install ok installed\n"
    )


def test_uris() -> None:
    digest = "0" * 64
    lines = [
        "Need to get 741 kB of source archives.",
        f"'http://mirror.example/h/hello_2.10.orig.tar.gz' hello_2.10.orig.tar.gz 725946 SHA256:{digest}",
        f"'http://mirror.example/h/hello_2.10-3.dsc' hello_2.10-3.dsc 1721 SHA256:{digest}",
    ]
    assert [(file.name, file.size) for file in parse_uris(lines)] == [
        ("hello_2.10-3.dsc", 1721),
        ("hello_2.10.orig.tar.gz", 725946),
    ]
    with pytest.raises(FetchError):
        parse_uris(lines[:2])
    with pytest.raises(FetchError):
        parse_uris([*lines, lines[1].replace("' hello", "' ../hello")])


@pytest.mark.parametrize(
    ("lines", "error", "text"),
    [
        (["E: Unable to find a source package for nosuch"], NotFoundError, "does not know"),
        (["E: Can not find version '9.9' of package 'hello'"], NotFoundError, "Can not find version '9.9'"),
        (
            [
                "The following packages have unmet dependencies:",
                " x : Depends: foo (>= 2) but it is not going to be installed",
                "E: Y",
            ],
            NotFoundError,
            "x : Depends: foo (>= 2) but it is not going to be installed",
        ),
        (["E: The repository 'http://m nosuch Release' does not have a Release file."], NotFoundError, "no suite bookworm"),
        (
            ["E: Failed to fetch http://m/x  Could not resolve 'm'", "E: Some index files failed"],
            FetchError,
            "Could not resolve",
        ),
    ],
)
def test_apts_words(lines: list[str], error: type[Exception], text: str) -> None:
    found = explain(["Reading package lists...", *lines], "bookworm")
    assert type(found) is error
    assert text in f"{found} {found.detail}"


def test_other_words_are_not_explained() -> None:
    assert explain(["E: Segmentation fault"], "bookworm") is None


def test_index(tmp_path: Path) -> None:
    path = tmp_path / "Sources"
    path.write_text(
        "Package: a\nBinary: a,\n liba1\nVersion: 1:1\nDepends: x\n\nPackage: a\nVersion: 2\n\nPackage: b\nVersion: 3"
    )
    index = read_index([path, tmp_path / "missing"])
    assert index.versions == {"a": ["1:1", "2"], "b": ["3"]}
    assert index.sources == {"a": "a", "liba1": "a"}


def recipe_of(*, released: ReleaseDate | None = RELEASED, version: str = "1:2.10-3", **fields: object) -> BuildRecipe:
    build = DebianBuild.model_validate({"package": "hello", **fields})
    dsc = Dsc(source="hello", version=version, architectures=("any",), files=())
    return make_recipe(build, dsc, "hello_2.10-3.dsc", "aarch64-linux", ("make=4.3-4.1",), released)


def test_recipe() -> None:
    recipe = recipe_of(features=["fast"], timeout=600, memory_size=512)
    assert (recipe.name, recipe.version, recipe.systems) == ("hello", "2.10-3", ("aarch64-linux",))
    assert recipe.packages == ("make=4.3-4.1",)
    assert (recipe.features, recipe.timeout, recipe.memory_size) == (("fast",), 600, 512)
    assert recipe.env["SOURCE_DATE_EPOCH"] == str(int(RELEASED.date.timestamp()))
    assert "DEB_BUILD_PROFILES" not in recipe.env
    unpack, build = recipe.steps
    assert unpack.startswith("dpkg-source --no-check --extract hello_2.10-3.dsc hello-2.10 ")
    assert 'DEB_BUILD_OPTIONS="parallel=$(nproc)"' in build
    assert "--build=binary --no-sign" in build


def test_long_version_fits_the_build_directory() -> None:
    assert len(recipe_of(version="1." + "2" * 90 + "-1").version) == 64


def test_options() -> None:
    recipe = recipe_of(check=False, build_options=["noopt", "parallel=3", "nocheck"])
    assert 'DEB_BUILD_OPTIONS="noopt parallel=3 nocheck"' in recipe.steps[1]
    assert recipe.env["DEB_BUILD_PROFILES"] == "nocheck"


@pytest.mark.parametrize("released", [None, ReleaseDate(RELEASED.date, "the newest file in x.tar.gz")])
def test_only_the_changelog_gives_the_epoch(released: ReleaseDate | None) -> None:
    assert "SOURCE_DATE_EPOCH" not in recipe_of(released=released).env


# What a request brings.

CONTENT = b"the source"


def dsc_text(name: str = "foo_1.tar.xz", content: bytes = CONTENT, size: int | None = None) -> bytes:
    digest = hashlib.sha256(content).hexdigest()
    listed = f" {digest} {len(content) if size is None else size} {name}\n"
    return f"Source: foo\nVersion: 1\nArchitecture: any\nChecksums-Sha256:\n{listed}".encode()


def send(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    path = tmp_path / "sent.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def plain(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def special(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def test_sent_package_is_kept_by_digest(tmp_path: Path) -> None:
    dsc = dsc_text()
    for order in (1, -1):
        sent = send(tmp_path, [plain("foo_1.dsc", dsc), plain("foo_1.tar.xz", CONTENT)][::order])
        package = take_sent(sent, "foo_1.dsc", tmp_path / "kept")
        assert [path.name for path in package.files] == ["foo_1.dsc", "foo_1.tar.xz"]
        assert [path.read_bytes() for path in package.files] == [dsc, CONTENT]
        assert package.files[1].parent.name == hashlib.sha256(CONTENT).hexdigest()


GOOD = plain("foo_1.tar.xz", CONTENT)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "did not come with the request"),
        ([GOOD], "did not come with the request"),
        ([plain("foo_1.dsc", dsc_text())], "lists foo_1.tar.xz, which did not come"),
        ([plain("foo_1.dsc", dsc_text()), plain("foo_1.tar.xz", b"THE SOURCE")], "has another digest than the .dsc says"),
        ([plain("foo_1.dsc", dsc_text()), plain("foo_1.tar.xz", CONTENT * 2)], "does not list"),
        ([plain("foo_1.dsc", dsc_text(size=1)), GOOD], "does not list"),
        ([plain("foo_1.dsc", dsc_text()), GOOD, plain("more", b"x")], "does not list 'more'"),
        ([plain("foo_1.dsc", dsc_text()), GOOD, GOOD], "does not list"),
        ([plain("foo_1.dsc", dsc_text()), plain("sub/foo_1.tar.xz", CONTENT)], "does not list"),
        ([plain("foo_1.dsc", dsc_text()), plain("../foo_1.tar.xz", CONTENT)], "leads out of the directory"),
        ([plain("foo_1.dsc", dsc_text()), special("foo_1.tar.xz", tarfile.SYMTYPE, "/etc/passwd")], "does not list"),
        ([plain("foo_1.dsc", dsc_text()), special("foo_1.tar.xz", tarfile.LNKTYPE, "foo_1.dsc")], "does not list"),
        ([plain("foo_1.dsc", dsc_text()), special("foo_1.tar.xz", tarfile.CHRTYPE)], "tar that can be taken"),
        ([special("foo_1.dsc", tarfile.SYMTYPE, "/etc/passwd"), GOOD], "did not come with the request"),
        ([plain("foo_1.dsc", dsc_text(name="../foo_1.tar.xz")), GOOD], "not a plain file name|plain file name"),
        ([plain("foo_1.dsc", dsc_text(size=9 << 40)), GOOD], "larger than"),
        ([plain("foo_1.dsc", b"x" * (1 << 21)), GOOD], "larger than 1 MiB"),
    ],
)
def test_hostile_requests(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], message: str) -> None:
    sent = send(tmp_path, members)
    with pytest.raises(SourceError, match=message):
        take_sent(sent, "foo_1.dsc", tmp_path / "kept")
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.name.startswith(".partial")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "sent.tar"]


def test_no_tar(tmp_path: Path) -> None:
    sent = tmp_path / "sent.tar"
    sent.write_bytes(b"\x1f\x8b" * 1000)
    with pytest.raises(SourceError, match="tar that can be taken"):
        take_sent(sent, "foo_1.dsc", tmp_path / "kept")
