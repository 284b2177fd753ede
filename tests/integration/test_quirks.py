"""`offload quirks` with a real daemon."""

from __future__ import annotations

import pytest

from offloadd.store.database import open_database
from tests.conftest import World

REASON = "qemu: uncaught target signal 11 (Segmentation fault) - core dumped"


@pytest.fixture
def remembered(world: World) -> World:
    world.run("quirks", "list")  # makes the database
    with open_database(world.state / "offload.sqlite") as database:
        database.add_quirk("libstdc++-doc", "aarch64-linux", REASON, "b1")
        database.add_quirk("hello", "aarch64-linux", REASON, "b2")
        database.add_quirk("hello", "s390x-linux", f"\x1b]0;owned\x07{REASON}", "b3")
    return world


def pairs(world: World) -> list[tuple[str, str]]:
    return [(row["name"], row["system"]) for row in world.json("quirks", "list")]


def test_quirks(remembered: World) -> None:
    world = remembered
    assert pairs(world) == [("hello", "aarch64-linux"), ("hello", "s390x-linux"), ("libstdc++-doc", "aarch64-linux")]
    shown = world.run("quirks", "list").stdout
    assert REASON in shown
    assert "\x1b" not in shown
    assert "forgot 1 quirk" in world.run("quirks", "forget", "hello", "-s", "s390x").stderr
    assert (
        "nothing is remembered of it for s390x-linux" in world.run("quirks", "forget", "hello", "-s", "s390x", status=5).stderr
    )
    world.run("quirks", "forget", "nothing", status=5)
    assert world.json("quirks", "forget", "libstdc++-doc") == {"forgotten": 1}
    assert pairs(world) == [("hello", "aarch64-linux")]
    assert world.json("quirks", "forget") == {"forgotten": 1}
    assert "Nothing is remembered" in world.run("quirks", "list").stdout
    world.run("quirks", "forget", "-s", "vax", status=2)
