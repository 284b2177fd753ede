"""Our keys, ACLs and lists of machines against the real Guix, from one node to another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from offloadd.guix.acl import open_acl
from offloadd.guix.files import store_owner
from offloadd.guix.key import KeyPair, make_signing_key
from offloadd.guix.machines import render_guix

from .conftest import MakeNode
from .derivations import guix_build
from .node import Node
from .offers import make_client_key, offer_of
from .trust import GUIX, trust_each_other

BY_HAND = f"(acl (entry (public-key (ecc (curve Ed25519) (q #{'ab' * 32}#))) (tag (guix import))))"


@pytest.fixture
def directory(node_a: Node) -> Iterator[Path]:
    """Guix's configuration directory of a node, as the package has made it."""
    directory = node_a.path(GUIX)
    shipped = directory.with_name("guix.shipped")
    shutil.copytree(directory, shipped)
    yield directory
    shutil.rmtree(directory)
    shipped.rename(directory)


@pytest.mark.parametrize("before", ["nothing", "the package's", "by hand", "own key"])
def test_authorize_writes_what_guix_writes(before: str, directory: Path, node_a: Node, tmp_path: Path) -> None:
    if before != "the package's":
        (directory / "acl").unlink()
    if before == "by hand":
        (directory / "acl").write_text(BY_HAND)
    if before == "own key":
        make_signing_key(directory)
    ours = tmp_path / "ours"
    shutil.copytree(directory, ours)
    # Guix also puts one first that it has already; for us that is no change.
    for name in ("first", "second", "second"):
        key = make_signing_key(tmp_path / name).public
        with open_acl(ours / "acl") as acl:
            acl.authorize(key, f"the {name}")
        node_a.run("guix", "archive", "--authorize", input=key.text)
        assert (ours / "acl").read_bytes() == (directory / "acl").read_bytes()


def test_key_pairs_have_the_form_of_guix_own(directory: Path, node_a: Node, tmp_path: Path) -> None:
    node_a.run("guix", "archive", "--generate-key")
    make_signing_key(tmp_path)
    for name in ("signing-key.pub", "signing-key.sec"):
        theirs, ours = directory / name, tmp_path / name
        assert theirs.stat().st_mode == ours.stat().st_mode
        # Between the signs there are the digits.
        assert theirs.read_bytes().split(b"#")[::2] == ours.read_bytes().split(b"#")[::2]
        assert [len(part) for part in theirs.read_bytes().split(b"#")] == [len(part) for part in ours.read_bytes().split(b"#")]


@dataclass(frozen=True)
class Pair:
    """Two machines that trust each other; A's guix-daemon offloads to B."""

    a: Node
    b: Node
    key: KeyPair
    """A's signing key, made by us; B's is made by Guix."""


@pytest.fixture(scope="module")
def pair(make_node: MakeNode) -> Pair:
    a, b = make_node("a"), make_node("b")
    key = make_signing_key(a.path(GUIX), store_owner(a.path("/gnu/store")))
    trust_each_other(a.path(GUIX), b)
    host_key = b.start_sshd(make_client_key(a))
    a.install(f"{GUIX}/machines.scm", render_guix([offer_of(b, host_key)]))
    b.start_guix_daemon()
    a.start_guix_daemon()
    return Pair(a, b, key)


def test_guix_takes_what_our_key_has_signed(pair: Pair) -> None:
    built = guix_build(pair.b, "signed-by-guix", "echo there >$out", local=True).stdout
    exported = pair.b.path("/tmp/from-b")
    pair.b.run("sh", "-c", f"guix archive --export {built} >/tmp/from-b")
    pair.a.install("/tmp/from-b", exported.read_bytes())
    pair.a.run("sh", "-c", "guix archive --import </tmp/from-b")
    # And the other way round, which is signed by our key.
    built = guix_build(pair.a, "signed-by-us", "echo here >$out", local=True).stdout
    pair.a.run("sh", "-c", f"guix archive --export {built} >/tmp/from-a")
    archive = pair.a.path("/tmp/from-a").read_bytes()
    pair.b.install("/tmp/from-a", archive)
    pair.b.run("sh", "-c", "guix archive --import </tmp/from-a")
    assert pair.b.path(built).read_text() == "here\n"


def test_guix_refuses_it_once_it_is_revoked(pair: Pair) -> None:
    built = guix_build(pair.a, "revoked", "echo here >$out", local=True).stdout
    pair.a.run("sh", "-c", f"guix archive --export {built} >/tmp/from-a")
    pair.b.install("/tmp/from-a", pair.a.path("/tmp/from-a").read_bytes())
    with open_acl(pair.b.path(f"{GUIX}/acl")) as acl:
        acl.revoke(pair.key.public.fingerprint)
    try:
        refused = pair.b.run("sh", "-c", "guix archive --import </tmp/from-a", status=None)
    finally:
        with open_acl(pair.b.path(f"{GUIX}/acl")) as acl:
            acl.authorize(pair.key.public)
    assert refused.returncode != 0
    assert "unauthorized public key" in refused.stderr
    assert not pair.b.path(built).exists()


def test_guix_offload_test_and_status_take_our_list(pair: Pair) -> None:
    tested = pair.a.run("guix", "offload", "test", user="guix-daemon")
    said = tested.stdout + tested.stderr
    # The exit status is 0 for an empty list, too.
    assert "testing 1 build machines" in said
    assert said.count("successfully imported") == 2
    status = pair.a.run("guix", "offload", "status", user="guix-daemon")
    assert status.stdout.count("host name: b") == 1


def test_derivation_goes_there_and_comes_back(pair: Pair) -> None:
    out = guix_build(pair.a, "there-and-back", "echo built; echo result >$out").stdout
    assert pair.a.path(out).read_text() == "result\n"
    assert pair.b.path(out).exists()
    assert list(pair.b.path("/var/log/guix/drvs").glob("*/*there-and-back.drv*"))


def test_derivation_that_fails_there_fails_here(pair: Pair) -> None:
    done = guix_build(pair.a, "fails-there", "echo what went wrong; exit 3", status=None)
    assert done.returncode != 0
    assert "what went wrong" in done.stderr
    assert list(pair.b.path("/var/log/guix/drvs").glob("*/*fails-there.drv*"))


def test_feature_that_the_machine_has_not_stays_here(pair: Pair) -> None:
    out = guix_build(pair.a, "elsewhere", "echo here >$out", features="quantum").stdout
    assert pair.a.path(out).read_text() == "here\n"
    assert not list(pair.b.path("/var/log/guix/drvs").glob("*/*elsewhere.drv*"))
