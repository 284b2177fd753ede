"""A guest that starts again whenever it should take its secrets: the real machine, firmware and boot sector, and no system."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import World
from tests.integration.bare_qemu import RESET, say

PAUSES_S = (1, 2, 4, 8, 16)


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> Iterator[World]:
    """A world whose machine `childhurd3` has a boot sector that speaks, and then resets the machine."""
    made = make_world()
    folders = {name: made.root / "config/offload" / name for name in ("images", "machines")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    code = say(b"no secrets: rebooting\r\n") + RESET
    disk = made.root / "disk.raw"
    disk.write_bytes(code + bytes(510 - len(code)) + b"\x55\xaa" + bytes(1 << 20))
    (folders["images"] / "test-restless.yaml").write_text(f"kind: file\npath: {disk}\n")
    (folders["machines"] / "childhurd3.yaml").write_text("kind: childhurd\nid: 3\nimage: test-restless\n")
    yield made
    made.run("image", "rm", "test-restless")


def test_is_started_again_five_times_and_then_reported_with_its_console(world: World) -> None:
    began = time.monotonic()
    started = world.run("vm", "start", "childhurd3", status=None)
    assert started.returncode != 0
    # The same phase with another number in it is told once.
    assert "==> it rebooted before it was ready: starting it again in 1" in started.stderr
    assert time.monotonic() - began > sum(PAUSES_S)
    assert "rebooted 6 times before anybody could log in" in " ".join(started.stderr.split())
    assert "no secrets: rebooting" in started.stderr
    shown = world.json("vm", "show", "childhurd3")
    assert shown["state"] in ("crashed", "stopped", "stopped-by-guest")
    assert "rebooted 6 times" in shown["reason"]
    world.assert_nothing_left()
