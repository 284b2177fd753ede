"""Builds for GNU/Hurd: where they go and what is said when they cannot, the real command line and the real daemon."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from ..conftest import World

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-system-x86_64")), reason="QEMU is not installed"
)
OTHER_KERNEL = "GNU/Hurd is another kernel: qemu-user runs only Linux programs"
SET_UP = "offload image set hurd-guix FILE-OR-URL"


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> World:
    return make_world()


@pytest.fixture(scope="module")
def set_up(make_world: Callable[[], World]) -> World:
    """A world whose childhurds have a disk: one is thrown away, one keeps it, one is its user's alone."""
    made = make_world()
    images = made.root / "config/offload/images"
    images.mkdir(parents=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", made.root / "disk.qcow2", "16M"], check=True)
    (images / "hurd-guix.yaml").write_text(f"like: hurd-guix\npath: {made.root}/disk.qcow2\nformat: qcow2\n")
    declare(made, "childhurd", "network: true\n")
    declare(made, "childhurd1", "id: 1\noptions: []\n")
    declare(made, "mine", "type: hurd64-qcow2\noffloading: false\n")
    return made


def declare(world: World, name: str, text: str) -> None:
    folder = world.root / "config/offload/machines"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"like: childhurd\n{text}")


def route(world: World, system: str, *options: str) -> dict[str, Any]:
    told: dict[str, Any] = world.json("route", system, *options, status=None)
    return told


def test_an_image_that_is_not_set_up(world: World) -> None:
    told = route(world, "i586-gnu")
    assert (told["machine"], told["hint"]) == (None, SET_UP)
    assert told["passed_over"]["childhurd"] == "its image hurd-guix is not set up"
    assert told["passed_over"]["binfmt"] == OTHER_KERNEL
    assert {"local", "build-vm"} <= set(told["unrelated"])
    assert not {"binfmt", "childhurd"} & set(told["unrelated"])


def test_a_build_is_refused_before_anything_starts(world: World) -> None:
    error = world.run("build", "-s", "i586-gnu", "guix:hello", status=4).stderr
    assert "  | childhurd: its image hurd-guix is not set up\n" in error
    assert f"  hint: {SET_UP}\n" in error


def test_the_lists_say_it_too(world: World) -> None:
    rows = {row["name"]: row for row in world.json("machine", "list")}
    assert (rows["childhurd"]["fault"], rows["childhurd"]["remedy"]) == ("its image hurd-guix is not set up", SET_UP)
    assert f"childhurd: its image hurd-guix is not set up: {SET_UP}" in " ".join(world.run("machine", "list").stdout.split())
    images = {row["name"]: row["state"] for row in world.json("image", "list")}
    assert (images["hurd-guix"], images["hurd-debian"]) == ("not set up", "not set up")
    assert world.json("image", "show", "hurd-guix")["state"] == "not set up"


def test_nobody_is_declared_for_the_64_bit_hurd(world: World) -> None:
    told = route(world, "hurd-amd64")
    assert (told["system"], told["machine"]) == ("x86_64-gnu", None)
    assert told["hint"] == "declare a machine of kind childhurd that builds for x86_64-gnu: docs/childhurd.md"


def test_who_has_guix(world: World) -> None:
    told = world.json("build", "--explain", "-s", "amd64", "guix:hello", status=4)
    assert told["passed_over"]["local"] == "lacks the feature guix"
    assert told["hint"] == "childhurd has guix, and builds for i586-gnu: -s i586-gnu"


def test_a_childhurd_has_to_boot_and_one_that_keeps_its_disk_to_be_started(set_up: World) -> None:
    told = route(set_up, "i586-gnu")
    assert [(one["machine"], one["cold"]) for one in told["candidates"]] == [("childhurd", True), ("childhurd1", True)]
    assert ["has to boot" in one["why"] for one in told["candidates"]] == [True, False]
    assert "has to be started" in told["candidates"][1]["why"]
    assert told["hint"] == ""
    assert route(set_up, "x86_64-gnu")["passed_over"]["mine"] == "takes no builds (`offloading: false` in its file)"


def test_a_date_is_for_one_that_is_thrown_away(set_up: World) -> None:
    told = route(set_up, "i586-gnu", "--date", "2020-01-01")
    assert told["machine"] == "childhurd"
    assert "whose clock is not moved" in told["passed_over"]["childhurd1"]
    assert "2038-01-19" in route(set_up, "i586-gnu", "--date", "2040-01-01")["passed_over"]["childhurd"]


def test_debian_packages_and_guix_ones(set_up: World) -> None:
    assert explained(set_up, "guix:hello")["machine"] == "childhurd"
    told = explained(set_up, "hello")
    assert told["machine"] is None
    assert "Guix's packages, not Debian's" in told["passed_over"]["childhurd"]
    declare(set_up, "childhurd2", "id: 2\nfeatures: [debian]\n")
    assert explained(set_up, "hello")["machine"] == "childhurd2"


def explained(world: World, what: str) -> dict[str, Any]:
    told: dict[str, Any] = world.json("build", "--explain", "-s", "i586-gnu", what, status=None)
    return told
