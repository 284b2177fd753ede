"""Damaged images and full disks: a clear error, the log kept, nothing left running."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import World
from tests.vm.test_build import wait_for
from tests.vm.test_templates import MADE

SMALL = "cpu-count: 2\nmemory-size: 512\nport-forwardings: {12822: 22}\n"


def own_image(world: World) -> Path:
    """A copy of debian's, in a cache where nothing else is this world's but its templates."""
    world.run("image", "build", "debian")
    image = Path(world.json("image", "show", "debian")["directory"])
    world.run("daemon", "stop")
    shared, cache = world.cache / "offload", world.root / "cache/offload"
    own = cache / "images" / image.name
    own.parent.mkdir(parents=True)
    subprocess.run(["cp", "-a", "--sparse=always", image, own], check=True)
    for folder in shared.iterdir():
        if folder.name not in ("images", "templates"):
            (cache / folder.name).symlink_to(folder)
    world.cache = cache.parent
    return own


def test_damaged_image_is_not_booted(make_world: Callable[[], World]) -> None:
    world = make_world()
    with (own_image(world) / "root.ext4").open("r+b") as disk:
        disk.seek(4096)
        byte = disk.read(1)
        disk.seek(4096)
        disk.write(bytes([byte[0] ^ 1]))

    world.machine("careful", SMALL)
    done = world.run("vm", "start", "careful", status=75)

    assert "the image is damaged" in done.stderr
    assert "offload image build --rebuild debian" in done.stderr
    world.assert_nothing_left()


def test_nothing_goes_on_from_a_template_above_an_image_that_was_made_anew(make_world: Callable[[], World]) -> None:
    """It has the same recipe, and so the same digest, but other files in other places."""
    world = make_world()
    disk = own_image(world) / "root.ext4"
    world.machine("careful", SMALL)
    recipe = world.recipe("nothing", "steps: ['true']\n")

    def build(name: str) -> tuple[str, bool]:
        """What the guest was, and whether a template was made for it."""
        done = world.run("build", "--machine", "careful", "-o", world.root / name, recipe)
        return json.loads((world.root / name / "build.json").read_text())["guest"], MADE in done.stderr

    assert build("first") == ("clone", True)
    assert build("second") == ("clone", False)
    [before] = world.json("template", "list")
    wait_for(lambda: len(world.waiting()) == 1)
    was = disk.stat().st_ino

    world.run("image", "build", "--rebuild", "debian")
    assert disk.stat().st_ino != was
    assert world.json("template", "list") == []
    assert world.waiting() == []
    assert build("third") == ("clone", True)
    [after] = world.json("template", "list")
    assert (after["image_digest"], after["stale"]) == (before["image_digest"], "")
    assert after["digest"] != before["digest"]

    # By hand, as from a copy of a cache.
    os.utime(disk)
    [old] = world.json("template", "list")
    assert (old["digest"], old["stale"]) == (after["digest"], "made from an older image")
    assert build("fourth") == ("clone", True)
    world.run("template", "gc")
    [new] = world.json("template", "list")
    assert new["digest"] != after["digest"]
    world.assert_nothing_left()


@pytest.fixture
def cramped(make_world: Callable[[], World]) -> Iterator[World]:
    """A world whose state directory is a file system of 24 MiB."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    world = make_world()
    state = world.root / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "offload-test", state], check=True)
    yield world
    world.stop_daemon()
    subprocess.run(["umount", state], check=True)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        pytest.param("head -c 100M /dev/urandom | base64", "the disk is full", id="log"),
        pytest.param("head -c 100M /dev/urandom > big; sync; sleep 60", "the host's disk is full", id="guests-disk"),
    ],
)
def test_full_disk_ends_the_build_with_that_reason(cramped: World, tmp_path: Path, step: str, words: str) -> None:
    recipe = cramped.recipe("large", f"steps: [{json.dumps(step)}]\n")
    done = cramped.run("build", "--machine", "build-vm", "-o", tmp_path / "out", recipe, status=75)

    assert words in done.stderr
    cramped.assert_nothing_left()
