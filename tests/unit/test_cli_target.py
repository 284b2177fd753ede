"""What the word on the command line means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from offload_cli.request import make_requests
from offload_cli.route import decision_table
from offload_cli.target import DebianOptions, Target, find_target
from offloadd.client import Client
from offloadd.config import requests
from offloadd.errors import NotFoundError, OffloadError, UsageError
from offloadd.model.asked import Asked, Changes, RecipeFile
from offloadd.model.recipe import BuildRecipe, BuildRequest, DebianBuild


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def project(folder: Path, text: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "offload.yaml").write_text(f"name: thing\nversion: '2'\nsteps: ['true']\n{text}")


def asked_of(target: Target, **more: Any) -> Sequence[BuildRequest]:
    return requests.make_requests(replace(target.asked, **more))


def debian(target: Target) -> DebianBuild:
    work = asked_of(target)[0].work
    assert isinstance(work, DebianBuild)
    return work


def recipe(target: Target) -> BuildRecipe:
    work = asked_of(target)[0].work
    assert isinstance(work, BuildRecipe)
    return work


def test_nothing_is_the_current_directory(here: Path) -> None:
    project(here)
    target = find_target(None, Changes(), DebianOptions())
    assert (target.directory, recipe(target).name, recipe(target).version) == (here, "thing", "2")


@pytest.mark.parametrize(
    ("word", "package", "version", "name"),
    [
        ("hello", "hello", None, "hello"),
        ("hello=2.10-3", "hello", "2.10-3", "hello-2.10-3"),
        ("g++-12=1:12.2.0-14", "g++-12", "1:12.2.0-14", "g++-12-12.2.0-14"),
        ("debian:hello", "hello", None, "hello"),
    ],
)
def test_a_package(word: str, package: str, version: str | None, name: str) -> None:
    target = find_target(word, Changes(), DebianOptions(build_options=("noopt",), check=False))
    work = debian(target)
    assert (work.package, work.version, target.name) == (package, version, name)
    assert (work.build_options, work.check) == (("noopt",), False)
    assert target.directory is None


@pytest.mark.parametrize(
    ("word", "name", "version", "result"),
    [
        ("guix:hello", "hello", "0", "hello"),
        ("guix:gtk+@3.24.1", "gtk+", "3.24.1", "gtk+-3.24.1"),
        ("guix:texlive-latex-g.b4e", "texlive-latex-g.b4e", "0", "texlive-latex-g.b4e"),
    ],
)
def test_a_guix_package(here: Path, word: str, name: str, version: str, result: str) -> None:
    (here / word).mkdir()  # no matter
    target = find_target(word, Changes(requirements={"features": ("big",), "timeout": "1h"}), DebianOptions())
    work, package = recipe(target), word.removeprefix("guix:")
    assert (work.name, work.version, target.name, target.directory) == (name, version, result, None)
    assert work.steps == (f"guix build {package}", f"guix archive --export --recursive {package} > {package}.nar")
    assert work.outputs == (f"{package}.nar",)
    assert (work.features, work.network, work.timeout) == (("guix", "big"), True, 3600)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-f",
        "--load-path=x",
        "a b",
        "a;b",
        "a$(b)",
        "a`b`",
        "a&b",
        "a|b",
        "a>b",
        "../a",
        "a/b",
        "a@",
        "@1",
        "a@-b",
        "a@1@2",
        "a\nb",
        "a\n",
        "a'b",
        'a"b',
        "a\\b",
        "~a",
        "a*",
        "\u00e4",
        "\u0661",
        "a:out",
        "a" * 65,
    ],
)
def test_no_name_of_a_guix_package(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a Guix package"):
        find_target(f"guix:{name}", Changes(), DebianOptions())


def test_options_that_no_guix_package_has() -> None:
    with pytest.raises(UsageError, match="--no-check is for Debian packages"):
        find_target("guix:hello", Changes(), DebianOptions(check=False))
    with pytest.raises(UsageError, match="--output is for a directory, not for a Guix package"):
        find_target("guix:hello", Changes(outputs=("x",)), DebianOptions())


def test_a_directory_comes_before_a_package(here: Path) -> None:
    project(here / "hello")
    assert recipe(find_target("hello", Changes(), DebianOptions())).name == "thing"
    assert debian(find_target("debian:hello", Changes(), DebianOptions())).package == "hello"


@pytest.mark.parametrize("word", ["./hello", "some/where", "Hello_World", "/nowhere"])
def test_what_is_neither(word: str) -> None:
    with pytest.raises(NotFoundError, match="no such directory"):
        find_target(word, Changes(), DebianOptions())


def test_options_that_do_not_fit(here: Path) -> None:
    project(here / "dir")
    with pytest.raises(UsageError, match="--no-check is for Debian packages"):
        find_target("dir", Changes(), DebianOptions(check=False))
    with pytest.raises(UsageError, match="a command is for a directory"):
        find_target("hello", Changes(command=("make",)), DebianOptions())
    with pytest.raises(UsageError, match="--package is for a directory"):
        find_target("hello", Changes(packages=("gcc",)), DebianOptions())


@pytest.mark.parametrize("option", [("Noopt",), ("a b",), ("x;y",)])
def test_wrong_build_options(option: tuple[str, ...]) -> None:
    target = find_target("hello", Changes(), DebianOptions(build_options=option))
    with pytest.raises(UsageError, match="--build-option"):
        asked_of(target)


def test_a_dsc_that_is_not_there_or_none(here: Path) -> None:
    with pytest.raises(OffloadError, match=r"x\.dsc"):
        find_target("x.dsc", Changes(), DebianOptions())
    (here / "x.dsc").write_text("not one\n")
    with pytest.raises(OffloadError, match=r"x\.dsc"):
        find_target("./x.dsc", Changes(), DebianOptions())


def test_systems(here: Path) -> None:
    project(here, "systems: [amd64, arm64]\n")
    target = find_target(None, Changes(), DebianOptions())

    def systems(*given: str, **more: Any) -> list[str | None]:
        return [request.system for request in asked_of(target, systems=given, **more)]

    assert systems() == [None]
    assert systems("arm64", "aarch64-linux", "i386") == ["aarch64-linux", "i686-linux"]
    assert systems(all_systems=True) == ["x86_64-linux", "aarch64-linux"]
    with pytest.raises(UsageError, match="do not go together"):
        systems("arm64", all_systems=True)
    with pytest.raises(UsageError, match="--system: unknown system type 'arm46'"):
        systems("arm46")
    with pytest.raises(UsageError, match="SYSTEM: unknown system type 'arm46'"):
        systems("arm46", systems_option="SYSTEM")
    target = find_target("hello", Changes(), DebianOptions())
    with pytest.raises(UsageError, match="names no systems"):
        systems(all_systems=True)


def test_requirements_reach_the_recipe(here: Path) -> None:
    project(here, "features: [kvm]\n")
    target = find_target(
        None, Changes(requirements={"features": ("big",), "network": True, "suite": "trixie"}), DebianOptions()
    )
    work = recipe(target)
    assert (work.features, work.network, work.suite) == (("kvm", "big"), True, "trixie")


def decision(**changes: Any) -> dict[str, Any]:
    return {
        "system": "aarch64-linux",
        "machine": "binfmt",
        "candidates": [{"machine": "binfmt", "kind": "binfmt", "why": "user emulation"}],
        "passed_over": {"arm": "is drained", "build-vm": "builds x86", "local": "builds x86_64-linux, not aarch64-linux"},
        "kinds": {"arm": "ssh", "build-vm": "build-vm", "local": "local"},
        "unrelated": ["build-vm", "local"],
        "hint": "",
        **changes,
    }


def test_the_decision_as_a_table() -> None:
    assert decision_table(decision()).splitlines() == [
        "aarch64-linux: binfmt",
        "RANK  MACHINE  KIND    WHY",
        "1     binfmt   binfmt  user emulation",
        "-     arm      ssh     no: is drained",
        "not for aarch64-linux: build-vm, local",
    ]
    nobody = decision(machine=None, candidates=[], passed_over={"local": "builds x86"}, unrelated=["local"], hint="do this")
    assert decision_table(nobody).splitlines() == [
        "aarch64-linux: no machine can do this build",
        "not for aarch64-linux: local",
        "hint: do this",
    ]


def test_a_decision_fits_the_terminal() -> None:
    why = "qemu-user does not build it right since a long time ago (to try it again: offload quirks forget hello)"
    many = [f"emulated-{number}" for number in range(20)]
    shown = decision_table(decision(passed_over={"arm": why} | dict.fromkeys(many, "no"), unrelated=many), 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert f"no: {why}" in " ".join(shown.split())
    assert " ".join(shown.split()).endswith(", ".join(many))


def test_words_that_are_neither_a_directory_nor_a_package(here: Path) -> None:
    with pytest.raises(NotFoundError, match="no Debian package is called so") as caught:
        find_target("Hello", Changes(), DebianOptions())
    assert "lower case" in caught.value.hint
    with pytest.raises(NotFoundError, match="no such directory"):
        find_target("./Hello", Changes(), DebianOptions())


def test_the_date_of_a_directory(here: Path) -> None:
    project(here, "")
    (here / "debian").mkdir()
    (here / "debian/changelog").write_text("p (1) s; urgency=low\n\n -- A <a@b.c>  Mon, 02 Jan 2012 10:00:00 +0000\n")
    told = {"date": "2012-01-02T10:00:00Z", "origin": "debian/changelog of p 1"}
    asked = find_target(None, Changes(), DebianOptions()).asked
    assert released(asked, here) is None
    assert released(replace(asked, options={"date": "auto"}), here) == told
    assert released(replace(asked, options={"date": "2020-01-01"}), here) is None
    assert released(find_target("hello", Changes(), DebianOptions()).asked, None) is None
    dated = RecipeFile(path="offload.yaml", text="steps: ['true']\ndate: auto\n")
    assert released(replace(asked, file=dated), here) == told
    assert released(replace(asked, file=dated, options={"date": "2020-01-01"}), here) is None


class Daemon(Client):
    """What the daemon does with what is asked for, without one."""

    def __init__(self) -> None:
        pass

    def post(self, path: str, body: Any = None) -> Any:
        assert path == "/v1/requests"
        return [request.to_json() for request in requests.make_requests(TypeAdapter(Asked).validate_python(body))]


def released(asked: Asked, directory: Path | None) -> object:
    (request,) = make_requests(Daemon(), asked, directory)
    return request["released"]
