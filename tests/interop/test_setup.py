"""`offload guix setup` and `offload nix setup`: the real Guix and Nix read what they write, and what was there comes back."""

from __future__ import annotations

import re
from pathlib import Path

import asyncssh
import pytest

from tests.conftest import World

from .conftest import MakeNode
from .node import Node, free_port

# Code that no reader of ours understands, with the last form in a shape of its own.
_OWN = """\
;; Mine.
(use-modules (ice-9 match) (srfi srfi-1))
(define (machine port)
  (build-machine (name "localhost") (port port) (systems '("x86_64-linux")) (user "me")
                 (host-key "HOST-KEY") (private-key "PRIVATE-KEY")))
`(,@(map machine (filter positive? (list PORT 0))) ; not ours: )
  #;(machine 1))
"""


@pytest.fixture(scope="module")
def node(make_node: MakeNode, world: World) -> Node:
    """Sees the directories of the world at the same place."""
    return make_node("setup", [world.root])


def make_key(path: Path) -> str:
    """A key to log in with; returns the public half."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    path.write_bytes(key.export_private_key())
    path.chmod(0o600)
    return " ".join(key.export_public_key().decode().split()[:2])


@pytest.fixture(scope="module")
def machines(world: World) -> None:
    """One that is always offered to Guix as running, where nobody listens; and one that is started when it is needed."""
    key = world.root / "key"
    folder = world.root / "config/offload/machines"
    folder.mkdir(parents=True)
    (folder / "far.yaml").write_text(
        f"kind: ssh\nname: far\nsystems: [x86_64-linux]\nhost: 127.0.0.1\nport: {free_port()}\n"
        f"host-key: {make_key(key)}\nprivate-key: {key}\ndaemons: [guix]\n"
    )
    world.machine("near", "daemons: [guix, nix]\n")


def machine_count(node: Node, etc: Path) -> int:
    """How many Guix finds in its machines.scm."""
    said = node.run("guix", "offload", "test", env={"GUIX_CONFIGURATION_DIRECTORY": str(etc)}, status=None).stderr
    found = re.search(r"testing (\d+) build machines", said)
    assert found, said
    return int(found[1])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes()) for path in files}


@pytest.mark.usefixtures("machines")
def test_guix_reads_it_and_the_user_s_own_stays(node: Node, world: World) -> None:
    etc = world.root / "etc/guix"
    etc.mkdir(parents=True)
    own = _OWN.replace("PORT", str(free_port())).replace("HOST-KEY", make_key(world.root / "own"))
    (etc / "machines.scm").write_text(own.replace("PRIVATE-KEY", str(world.root / "own")))
    before = contents(world.root / "etc")
    assert machine_count(node, etc) == 1

    told = world.json("guix", "setup", "--directory", etc, "--dry-run")
    assert contents(world.root / "etc") == before
    done = world.run("guix", "setup", "--directory", etc)
    assert done.stdout.splitlines() == told
    assert "far: not ours" in done.stderr
    assert "nothing to do" in world.run("guix", "setup", "--directory", etc).stderr

    # The user's, and the one of ours that runs; `near` is not waited for.
    assert machine_count(node, etc) == 2
    assert_trusted(node, etc, world.state / "secrets/near/root/etc/guix")

    # Without a daemon of ours, everything is as before.
    world.run("daemon", "stop")
    assert machine_count(node, etc) == 1

    undone = world.run("guix", "setup", "--directory", etc, "--undo").stdout
    assert f"{etc}/machines.scm: restored\n" in undone
    assert contents(world.root / "etc") == before
    assert not (world.state / "secrets/near/root/etc/guix").exists()
    assert machine_count(node, etc) == 1


def assert_trusted(node: Node, host: Path, guest: Path) -> None:
    """Guix itself has nothing to add: both have the other's key in the ACL, in its own form."""
    for one, other in ((host, guest), (guest, host)):
        acl = (one / "acl").read_bytes()
        environment = {"GUIX_CONFIGURATION_DIRECTORY": str(one)}
        node.run("guix", "archive", "--authorize", env=environment, input=(other / "signing-key.pub").read_bytes())
        assert (one / "acl").read_bytes() == acl
        assert (other / "signing-key.pub").read_text().split("#")[1] in acl.decode()


@pytest.mark.usefixtures("machines")
def test_nix_asks_our_hook(node: Node, world: World) -> None:
    etc = world.root / "etc/nix"
    etc.mkdir(parents=True)
    (etc / "nix.conf").write_text("experimental-features = nix-command\ncores = 3")
    before = contents(etc)
    show = ("nix", "config", "show")
    environment = {"NIX_CONF_DIR": str(etc)}
    plain = node.run(*show, "build-hook", env=environment).stdout
    world.run("nix", "setup", "--directory", etc)
    assert node.run(*show, "build-hook", env=environment).stdout == f"{etc}/offload/hook\n"
    assert node.run(*show, "cores", env=environment).stdout == "3\n"
    assert "exec " in (etc / "offload/hook").read_text()
    world.run("nix", "setup", "--directory", etc, "--undo")
    assert contents(etc) == before
    assert node.run(*show, "build-hook", env=environment).stdout == plain


@pytest.mark.usefixtures("machines")
def test_what_cannot_be_set_up(world: World) -> None:
    etc = world.root / "etc/broken"
    etc.mkdir(parents=True)
    (etc / "machines.scm").write_text("(list\n  (build-machine)))\n")
    wrong = world.run("guix", "setup", "--directory", etc, status=3)
    assert f"{etc}/machines.scm:2:19: closes what was not opened" in wrong.stderr
    assert [path.name for path in etc.iterdir()] == ["machines.scm"]
    assert "nothing to undo" in world.run("guix", "setup", "--directory", etc, "--undo").stderr
    assert "takes no builds of Guix" in world.run("guix", "setup", "local", "--directory", etc, status=5).stderr
    assert "nothing was set up" in world.run("guix", "setup", "near", "--directory", etc, "--undo", status=5).stderr
