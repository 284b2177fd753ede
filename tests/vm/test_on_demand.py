"""A machine that a build daemon's hook asks for is started, held, and stopped when nobody needs it any more."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ..conftest import World
from ..integration.foreign_hooks import GUIX
from ..integration.test_hooks import guix_hook, guix_request


def test_started_by_a_hook_and_stopped_when_idle(make_world: Callable[[], World]) -> None:
    world = make_world()
    world.machine(
        "sleeper", "daemons: [guix]\nidle-timeout: 2s\nport-forwardings: {11722: 22}\ncpu-count: 1\nmemory-size: 512\n"
    )
    guix = world.root / "guix"
    guix.write_text(GUIX.format(python=sys.executable))
    guix.chmod(0o755)
    configuration = world.root / "etc"
    configuration.mkdir()
    (configuration / "acl").write_text("(acl)")
    assert state(world) == "stopped"
    with guix_hook(world, configuration) as asked:
        replies: list[str] = []
        deadline = time.monotonic() + 300
        while not replies or (replies[-1] == "# postpone" and time.monotonic() < deadline):
            asked.tell(guix_request())
            replies.append(asked.reply())
            time.sleep(0.5)
        assert replies[0] == "# postpone"
        assert replies[-1] == "# accept"
        # A lease is worth more than the time-out.
        time.sleep(4)
        assert state(world) == "running"
        status, seen, _ = asked.end(b"in \nout \n")
    assert status == 0
    assert seen["keys"] == [str(world.state / "secrets/sleeper/id_ed25519")]
    deadline = time.monotonic() + 60
    while state(world) != "stopped" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert state(world) == "stopped"
    world.assert_nothing_left()


def state(world: World) -> str:
    rows = world.json("machine", "list")
    return next(str(row["state"]) for row in rows if row["name"] == "sleeper")
