"""Debian's guix-daemon runs as a user of its own, who reaches nothing of root's: its hook and its list ask at the door."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest

from offloadd.guix.files import store_owner

from ..conftest import REPOSITORY, World
from .conftest import MakeNode
from .derivations import guix_build
from .node import Node
from .trust import trust_each_other


@dataclass(frozen=True)
class Pair:
    """A's guix-daemon has what `offload guix setup` wrote; B is the machine."""

    world: World
    a: Node
    b: Node
    etc: Path


@pytest.fixture(scope="module")
def pair(make_world: Callable[[], World], make_node: MakeNode) -> Pair:
    world = make_world()
    # What is the user's alone stays so: state and runtime directory have mode 0700.
    world.root.chmod(0o711)
    a, b = make_node("a", [REPOSITORY, world.root]), make_node("b")
    key = asyncssh.generate_private_key("ssh-ed25519")
    secret = world.root / "state/key"
    secret.parent.mkdir(mode=0o700)
    secret.write_bytes(key.export_private_key())
    secret.chmod(0o600)
    host_key = b.start_sshd(key.export_public_key().decode().strip())
    folder = world.root / "config/offload/machines"
    folder.mkdir(parents=True)
    (folder / "node.yaml").write_text(
        f"kind: ssh\nname: node\nhost: 127.0.0.1\nport: {b.ssh_port}\nuser: offloading\nhost-key: {host_key}\n"
        f"private-key: {secret}\nsystems: [x86_64-linux]\nfeatures: [big-parallel]\noverload-threshold: null\ndaemons: [guix]\n"
    )
    etc = world.root / "etc/guix"
    etc.mkdir(parents=True)
    os.chown(etc, *_owner(a))
    world.run("guix", "setup", "--directory", etc, "--socket-directory", world.root / "doors")
    # The hook names the Python that runs these tests.  Of a virtual environment A has at most links to what it does not have.
    python = a.path(sys.executable)
    if sys.prefix != sys.base_prefix and a.path(sys.prefix).is_dir():
        a.run("busybox", "mount", "-t", "tmpfs", "tmpfs", sys.prefix)
    if not python.exists():
        python.parent.mkdir(parents=True, exist_ok=True)
        python.symlink_to("/usr/bin/python3")
    trust_each_other(etc, b)
    b.start_guix_daemon()
    a.start_guix_daemon(env={"GUIX": f"{etc}/offload/hook", "GUIX_CONFIGURATION_DIRECTORY": str(etc)})
    return Pair(world, a, b, etc)


def _owner(node: Node) -> tuple[int, int]:
    owner = store_owner(node.path("/gnu/store"))
    assert owner is not None
    assert owner.uid != 0
    return owner


def explain(pair: Pair, said: str) -> str:
    """What everybody has said, for the message of a failed test."""
    log = pair.world.state / "offloadd.log"
    return f"{said}\n--- offloadd\n{log.read_text()}\n{pair.a.logs()}\n{pair.b.logs()}"


def status(pair: Pair) -> str:
    """What guix-daemon's user is told by Guix of the list of machines."""
    argv = ["env", f"GUIX_CONFIGURATION_DIRECTORY={pair.etc}", "guix", "offload", "status"]
    done = pair.a.run(*argv, env={"HOME": "/var/empty"}, user="guix-daemon", status=None)
    return done.stdout + done.stderr


def test_its_hook_builds_on_our_machine(pair: Pair) -> None:
    uid, _ = _owner(pair.a)
    assert pair.a.run("stat", "-c", "%u", f"{pair.etc}/offload/ssh/node").stdout == f"{uid}\n"
    # Without it guix itself, which the hook leaves to its own when it does not reach our daemon, has no machine.
    machines = pair.etc / "machines.scm"
    machines.rename(pair.etc / "away")
    try:
        done = guix_build(pair.a, "unprivileged", "echo unprivileged >$out")
    finally:
        (pair.etc / "away").rename(machines)
    assert pair.a.path(done.stdout).read_text() == "unprivileged\n"
    assert list(pair.b.path("/var/log/guix/drvs").glob("*/*unprivileged.drv*")), explain(pair, done.stderr)
    assert not list(pair.a.path("/tmp").glob("offload-hook-*"))


def test_it_builds_here_what_no_machine_takes(pair: Pair) -> None:
    done = guix_build(pair.a, "here", "echo here >$out", features="kvm")
    assert pair.a.path(done.stdout).read_text() == "here\n"
    assert not list(pair.b.path("/var/log/guix/drvs").glob("*/*here.drv*"))


def test_without_offload_its_guix_does_the_rest(pair: Pair) -> None:
    """guix-daemon starts all its helpers through the hook: they are what fails when the hook does."""
    hook = pair.etc / "offload/hook"
    text = hook.read_text()
    assert "[ -x" in text
    try:
        hook.write_text(text.replace(f"[ -x {sys.executable} ]", "[ -x /nothing/here ]"))
        asked = pair.a.run(hook, "offload", "--version", user="guix-daemon")
        assert "GNU Guix" in asked.stdout
        done = guix_build(pair.a, "without", "echo without >$out")
    finally:
        hook.write_text(text)
    assert pair.a.path(done.stdout).read_text() == "without\n"


def test_its_list_has_the_machine_while_our_daemon_runs(pair: Pair) -> None:
    """The last one: it ends the daemon."""
    said = status(pair)
    assert "127.0.0.1" in said, explain(pair, said)
    pair.world.stop_daemon()
    assert "127.0.0.1" not in status(pair)
    done = guix_build(pair.a, "alone", "echo alone >$out")
    assert pair.a.path(done.stdout).read_text() == "alone\n"
