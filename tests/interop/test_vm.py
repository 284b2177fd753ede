"""Guix and Nix of one node, and a virtual machine whose clock says 2020."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, World

from .conftest import MakeNode
from .derivations import guix_build, nix_build
from .node import NIX_CONF, Node, free_port, wait_until

NAME = "guix-vm"
# Longer than the 5 s after which guix-daemon asks again: it would find the machine stopped each time.
IDLE_S = 10
SEEN = "date -u +%Y-%m-%d >$out"
NIX_MACHINES = "/etc/nix/offload.machines"


@dataclass(frozen=True)
class Bench:
    """A node whose daemons know the machine, and the world that the machine belongs to."""

    world: World
    node: Node

    @property
    def guix(self) -> Path:
        """Guix's configuration directory.  The node and the host call it the same, and so do the files in it."""
        return self.world.root / "guix"

    @property
    def nix(self) -> Path:
        """Nix's."""
        return self.world.root / "nix"

    def state(self) -> str:
        return str(self.world.json("vm", "show", NAME)["state"])

    def wait_for(self, state: str) -> None:
        wait_until(lambda: self.state() == state, f"{NAME} to be {state}", self.node.logs, limit_s=120)


@pytest.fixture(scope="module")
def bench(world: World, make_node: MakeNode) -> Bench:
    """Both sides are set up; the machine has not been started."""
    text = (REPOSITORY / f"machines/{NAME}.yaml.example").read_text()
    text = re.sub(r"11122: 22\b", f"{free_port()}: 22", text)
    text = re.sub(r"idle-timeout: \w+", f"idle-timeout: {IDLE_S}", text)
    folder = world.root / "config/offload/machines"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.yaml").write_text(text)
    bench = Bench(world, make_node("a", shared=[world.root, REPOSITORY / "offloadd", REPOSITORY / "cli"]))
    world.run("image", "build", "debian-guix")
    bench.guix.mkdir()
    bench.nix.mkdir()
    (bench.nix / "nix.conf").write_text(NIX_CONF)
    world.run("guix", "setup", NAME, "--directory", bench.guix)
    world.run("nix", "setup", NAME, "--directory", bench.nix)
    # The hooks are run by this interpreter, which has its own library and nothing else.
    python = bench.node.path(sys.executable)
    python.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(python):
        python.symlink_to("/usr/bin/python3")
    return bench


@pytest.fixture(scope="class")
def started(bench: Bench) -> Iterator[Bench]:
    """The machine runs because its user has started it; the node's daemons have lists."""
    bench.world.run("vm", "start", NAME)
    bench.node.install(NIX_MACHINES, bench.world.run("machine", "export", "--format", "nix", NAME).stdout)
    # Root's: whoever may ask our daemon is root here.
    guix = bench.node.start_guix_daemon(unprivileged=False, env={"GUIX_CONFIGURATION_DIRECTORY": str(bench.guix)})
    nix = bench.node.start_nix_daemon()
    yield bench
    for daemon in (guix, nix):
        bench.node.end(daemon)
    bench.world.run("vm", "stop", NAME)


class TestMachineThatRuns:
    """Through the lists that we have exported."""

    def test_guix(self, started: Bench) -> None:
        out = guix_build(started.node, "seen-by-guix", SEEN).stdout
        assert started.node.path(out).read_text() == "2020-01-01\n"

    @pytest.mark.parametrize("remote", ["", "daemon"])
    def test_nix(self, remote: str, started: Bench) -> None:
        options = ["--builders", f"@{NIX_MACHINES}", "--max-jobs", "0"]
        done = nix_build(started.node, f"seen-by-nix{remote}", SEEN, *options, env={"NIX_REMOTE": remote})
        assert started.node.path(done.stdout.strip()).read_text() == "2020-01-01\n"


@pytest.fixture(scope="class")
def hooked(bench: Bench) -> Bench:
    """The machine is stopped; the node's daemons have our hooks."""
    guix = {"GUIX_CONFIGURATION_DIRECTORY": str(bench.guix), "GUIX": str(bench.guix / "offload/hook")}
    bench.node.start_guix_daemon(unprivileged=False, env=guix)
    bench.node.start_nix_daemon(env={"NIX_CONF_DIR": str(bench.nix)})
    return bench


class TestMachineThatIsStopped:
    """Through our hooks: it is started, builds, and is stopped again."""

    def test_guix(self, hooked: Bench) -> None:
        assert hooked.state() == "stopped"
        out = guix_build(hooked.node, "hooked-by-guix", SEEN).stdout
        assert hooked.node.path(out).read_text() == "2020-01-01\n"
        hooked.wait_for("stopped")

    def test_nix(self, hooked: Bench) -> None:
        assert hooked.state() == "stopped"
        env = {"NIX_REMOTE": "daemon", "NIX_CONF_DIR": str(hooked.nix)}
        done = nix_build(hooked.node, "hooked-by-nix", SEEN, "--max-jobs", "0", env=env)
        assert hooked.node.path(done.stdout.strip()).read_text() == "2020-01-01\n"
        hooked.wait_for("stopped")
