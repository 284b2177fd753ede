"""Our lines of machines against the real Nix, from one node to another."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from offloadd.model.offer import Offer
from offloadd.nix.machines import NixScheme, nix_line, render_ssh_config

from .conftest import MakeNode
from .derivations import nix_build
from .node import Node
from .offers import make_client_key, offer_of

DAEMON = {"NIX_REMOTE": "daemon"}


@dataclass(frozen=True)
class Pair:
    """Two machines with nix-daemon; A can log in on B."""

    a: Node
    b: Node
    offer: Offer


@pytest.fixture(scope="module")
def pair(make_node: MakeNode) -> Pair:
    a, b = make_node("a"), make_node("b")
    offer = offer_of(b, b.start_sshd(make_client_key(a)))
    b.start_nix_daemon()
    a.start_nix_daemon()
    return Pair(a, b, offer)


def assert_built_there(pair: Pair, out: str, name: str) -> None:
    path = out.strip()
    assert path.endswith(f"-{name}")
    assert pair.a.path(path).read_text() == f"{name}\n"
    assert pair.b.path(path).exists()
    assert list(pair.b.path("/nix/var/log/nix/drvs").glob(f"*/*{name}.drv*"))


@pytest.mark.parametrize("scheme", ["ssh-ng", "ssh"])
@pytest.mark.parametrize("through_daemon", [False, True])
def test_line_on_the_command_line(scheme: NixScheme, through_daemon: bool, pair: Pair) -> None:
    name = f"line-{scheme}-{through_daemon}"
    line = nix_line(pair.offer, scheme)
    # No job here: what is not offloaded is not built.
    options = ["--builders", line, "--max-jobs", "0"]
    done = nix_build(pair.a, name, f"echo {name} >$out", *options, env=DAEMON if through_daemon else None)
    assert_built_there(pair, done.stdout, name)


def test_file_of_lines(pair: Pair) -> None:
    pair.a.install("/etc/nix/offload.machines", f"# ours\n{nix_line(pair.offer)}\n")
    done = nix_build(pair.a, "file", "echo file >$out", "--builders", "@/etc/nix/offload.machines", "--max-jobs", "0")
    assert_built_there(pair, done.stdout, "file")


def test_file_that_nix_looks_for(pair: Pair) -> None:
    machines = pair.a.install("/etc/nix/machines", f"{nix_line(pair.offer)}\n")
    try:
        done = nix_build(pair.a, "default-file", "echo default-file >$out", "--max-jobs", "0")
    finally:
        machines.unlink()
    assert_built_there(pair, done.stdout, "default-file")


def test_ssh_config_in_the_place_of_a_port(pair: Pair) -> None:
    """Without a port in the URI, as old versions of Nix need it."""
    config = pair.a.install("/root/.ssh/config", render_ssh_config(pair.offer, "offload-b"), mode=0o600)
    try:
        line = nix_line(pair.offer, "ssh", alias="offload-b")
        assert str(pair.offer.port) not in line
        done = nix_build(pair.a, "alias", "echo alias >$out", "--builders", line, "--max-jobs", "0")
    finally:
        config.unlink()
    assert_built_there(pair, done.stdout, "alias")


def test_features_that_a_build_requires(pair: Pair) -> None:
    options = ["--builders", nix_line(pair.offer), "--max-jobs", "0"]
    done = nix_build(pair.a, "featured", "echo featured >$out", *options, features=["big-parallel"])
    assert_built_there(pair, done.stdout, "featured")
    refused = nix_build(pair.a, "unfeatured", "echo >$out", *options, features=["quantum"], status=None)
    assert refused.returncode != 0


def test_host_with_another_key_gets_nothing(pair: Pair) -> None:
    false = replace_key(pair.offer)
    done = nix_build(pair.a, "impostor", "echo >$out", "--builders", nix_line(false), "--max-jobs", "0", status=None)
    assert done.returncode != 0
    assert "Host key verification failed" in done.stderr
    assert not list(pair.b.path("/nix/var/log/nix/drvs").glob("*/*impostor.drv*"))


def replace_key(offer: Offer) -> Offer:
    """The same machine, with the key of another one."""
    kind, key = offer.host_key.split()
    return offer.model_copy(update={"host_key": f"{kind} {key[:-4]}{'AAAA' if key[-4:] != 'AAAA' else 'BBBB'}"})


def test_derivation_that_fails_there_fails_here(pair: Pair) -> None:
    options = ["--builders", nix_line(pair.offer), "--max-jobs", "0"]
    done = nix_build(pair.a, "fails-there", "echo what went wrong; exit 3", *options, status=None)
    assert done.returncode != 0
    assert "what went wrong" in done.stderr
    assert list(pair.b.path("/nix/var/log/nix/drvs").glob("*/*fails-there.drv*"))
