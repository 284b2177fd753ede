"""The real kernel of GNU/Hurd in a childhurd, and how its death is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from offloadd.model.childhurd import HURD_TYPES
from tests.conftest import World
from tests.vm.mach import open_mach


@pytest.fixture(scope="module", params=HURD_TYPES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World], kind: str) -> Iterator[World]:
    """A world whose machine `childhurd4` has a disk with Mach, and nothing that Mach could start."""
    made = make_world()
    folders = {name: made.root / "config/offload" / name for name in ("images", "machines")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    with open_mach(HURD_TYPES[kind]) as disk:
        (folders["images"] / "test-mach.yaml").write_text(f"kind: file\npath: {disk}\n")
        machine = f"kind: childhurd\nid: 4\nimage: test-mach\ntype: {kind}\n"
        (folders["machines"] / "childhurd4.yaml").write_text(machine)
        yield made
    made.assert_nothing_left()
    made.run("image", "rm", "test-mach")


def test_a_panic_of_mach_is_a_crash_with_its_last_words(world: World, kind: str) -> None:
    started = world.run("vm", "start", "childhurd4", status=None)
    shown = world.json("vm", "show", "childhurd4")
    console = world.run("vm", "logs", "childhurd4").stdout

    if kind == "hurd-qcow2":
        # The 64-bit one has said too much by the time that it finds its console, and loses this line.
        assert "GNU Mach 1." in console
    panic = "bootstrap_create: No bootstrap code loaded with the kernel!"
    assert started.returncode != 0
    assert f"the machine crashed: the guest's kernel panicked: {panic}" in " ".join(started.stderr.split())
    assert "RTC time is" in started.stderr, "the lines before it"
    assert shown["state"] == "crashed"
    assert panic in shown["reason"]
    # Mach waits 20 s before it reboots, and a guest that reboots is started again: neither is what happens.
    assert "starting it again" not in started.stderr
    world.assert_nothing_left()
