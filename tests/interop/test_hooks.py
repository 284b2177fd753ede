"""Our build hooks between the real guix-daemon and guix, and between the real Nix and `nix __build-remote`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from offloadd.guix.files import store_owner
from offloadd.guix.key import make_signing_key

from ..conftest import REPOSITORY, World
from .conftest import MakeNode
from .derivations import guix_build, nix_build
from .node import Node
from .offers import CLIENT_KEY, make_client_key
from .trust import GUIX, trust_each_other


@dataclass(frozen=True)
class Pair:
    """A's build daemons have our hooks, and a daemon of ours that knows the machine B."""

    world: World
    a: Node
    b: Node


@pytest.fixture(scope="module")
def pair(make_world: Callable[[], World], make_node: MakeNode) -> Pair:
    world = make_world()
    a, b = make_node("a", [REPOSITORY, world.root]), make_node("b")
    make_signing_key(a.path(GUIX), store_owner(a.path("/gnu/store")))
    trust_each_other(a.path(GUIX), b)
    host_key = b.start_sshd(make_client_key(a))
    folder = world.root / "config/offload/machines"
    folder.mkdir(parents=True)
    (folder / "node.yaml").write_text(
        f"kind: ssh\nname: node\nhost: 127.0.0.1\nport: {b.ssh_port}\nuser: offloading\nhost-key: {host_key}\n"
        f"private-key: {CLIENT_KEY}\nsystems: [x86_64-linux]\nfeatures: [big-parallel]\n"
        "overload-threshold: null\ndaemons: [guix, nix]\n"
    )
    world.run("machine", "list")
    install_hook(a, world, "guix-hook")
    install_hook(a, world, "nix-hook")
    b.start_guix_daemon()
    b.start_nix_daemon()
    # As root: our daemon's socket is for its own user and for root.
    a.start_guix_daemon("--disable-chroot", env={"GUIX": "/opt/guix-hook"}, unprivileged=False)
    a.start_nix_daemon()
    return Pair(world, a, b)


def install_hook(node: Node, world: World, name: str) -> None:
    variables = f"PYTHONPATH={REPOSITORY}:{REPOSITORY}/cli OFFLOAD_SOCKET={world.root}/run/offload/offloadd.sock"
    node.install(f"/opt/{name}", f'#!/bin/sh\n{variables} exec python3 -B -m offload_cli {name} "$@"\n', mode=0o755)


def test_guix_builds_on_our_machine(pair: Pair) -> None:
    done = guix_build(pair.a, "through-hook", "echo through-hook >$out")
    assert pair.a.path(done.stdout).read_text() == "through-hook\n"
    assert list(pair.b.path("/var/log/guix/drvs").glob("*/*through-hook.drv*"))
    assert list(pair.a.path("/var/log/guix/drvs").glob("*/*through-hook.drv*"))
    assert not list(pair.a.path("/tmp").glob("offload-hook-*"))


def test_guix_build_that_fails_there_fails_here(pair: Pair) -> None:
    done = guix_build(pair.a, "broken", "exit 3", status=None)
    assert done.returncode != 0
    assert list(pair.b.path("/var/log/guix/drvs").glob("*/*broken.drv*"))


def test_guix_builds_here_what_no_machine_takes(pair: Pair) -> None:
    done = guix_build(pair.a, "here", "echo here >$out", features="kvm")
    assert pair.a.path(done.stdout).read_text() == "here\n"
    assert not list(pair.b.path("/var/log/guix/drvs").glob("*/*here.drv*"))


def test_other_commands_of_the_daemon_reach_guix(pair: Pair) -> None:
    """guix-daemon signs what it exports by `$GUIX authenticate`."""
    path = guix_build(pair.a, "signed", "echo signed >$out", local=True).stdout
    assert pair.a.run("sh", "-c", f"guix archive --export {path} | grep -ac '(signature'").stdout == "1\n"


HOOK = ["--option", "build-hook", "/opt/nix-hook"]


@pytest.mark.parametrize("jobs", ["0", "1"])
def test_nix_builds_on_our_machine(pair: Pair, jobs: str) -> None:
    name = f"nix-hook-{jobs}"
    done = nix_build(pair.a, name, f"echo {name} >$out", *HOOK, "--builders", "", "--max-jobs", jobs, features=["big-parallel"])
    assert pair.a.path(done.stdout.strip()).read_text() == f"{name}\n"
    assert list(pair.b.path("/nix/var/log/nix/drvs").glob(f"*/*{name}.drv*"))
    # Without a port, which most versions of Nix do not take there: ssh has it from us.
    assert "on 'ssh-ng://offloading@127.0.0.1'" in done.stderr


def test_nix_build_that_fails_there_fails_here(pair: Pair) -> None:
    done = nix_build(pair.a, "nix-broken", "exit 3", *HOOK, "--builders", "", "--max-jobs", "0", status=None)
    assert done.returncode != 0


def test_without_our_daemon_both_build_here(pair: Pair) -> None:
    """The last one: it ends the daemon."""
    pair.world.stop_daemon()
    done = guix_build(pair.a, "alone", "echo alone >$out")
    assert pair.a.path(done.stdout).read_text() == "alone\n"
    done = nix_build(pair.a, "nix-alone", "echo nix-alone >$out", *HOOK, "--builders", "", "--max-jobs", "1")
    assert pair.a.path(done.stdout.strip()).read_text() == "nix-alone\n"
