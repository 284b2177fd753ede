"""Damaged images and full disks: a clear error, the log kept, nothing left running."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import World

SMALL = "cpu-count: 2\nmemory-size: 512\nport-forwardings: {12822: 22}\n"


def test_damaged_image_is_not_booted(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.run("image", "build", "debian")
    image = Path(world.json("image", "show", "debian")["directory"])
    world.run("daemon", "stop")
    # A copy of the cache with this image alone, and one byte of it changed.
    own = world.root / "cache/offload/images" / image.name
    own.parent.mkdir(parents=True)
    subprocess.run(["cp", "-a", "--sparse=always", image, own], check=True)
    world.cache = world.root / "cache"
    with (own / "root.ext4").open("r+b") as disk:
        disk.seek(4096)
        byte = disk.read(1)
        disk.seek(4096)
        disk.write(bytes([byte[0] ^ 1]))

    world.machine("careful", SMALL)
    done = world.run("vm", "start", "careful", status=75)

    assert "the image is damaged" in done.stderr
    assert "offload image build --rebuild debian" in done.stderr
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
