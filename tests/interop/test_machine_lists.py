"""Our lists of machines, read by the real Guix and the real Nix."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from offloadd.guix.machines import render_guix
from offloadd.guix.scheme import Datum, read_all
from offloadd.model.offer import Offer
from offloadd.nix.machines import nix_line, render_ssh_config

from ..conftest import World
from ..unit.offers import KEY, any_offers, make_offer, without_name
from .conftest import MakeNode
from .derivations import nix_build
from .node import Node
from .offers import CLIENT_KEY, make_client_key, offer_of

# As `guix offload` evaluates a list, and what it has of each machine, texts as the numbers of their characters.
EVALUATE = """\
(use-modules (guix scripts offload) (srfi srfi-1))
(define module (make-fresh-user-module))
(module-use! module (resolve-interface '(guix scripts offload)))
(define (plain value)
  (cond ((string? value) (cons 'text (map char->integer (string->list value))))
        ((list? value) (map plain value))
        (else value)))
(define-syntax-rule (fields machine accessor ...)
  (list (plain ((@@ (guix scripts offload) accessor) machine)) ...))
(for-each
  (lambda (machine)
    (write (fields machine build-machine-name build-machine-port build-machine-user build-machine-host-key
                   build-machine-private-key build-machine-systems build-machine-parallel-builds build-machine-speed
                   build-machine-features build-machine-overload-threshold))
    (newline))
  (save-module-excursion (lambda () (set-current-module module) (primitive-load (last (command-line))))))
"""
FIELDS = [
    "host",
    "port",
    "user",
    "host_key",
    "private_key",
    "systems",
    "parallel_builds",
    "speed",
    "features",
    "overload_threshold",
]


def evaluate(node: Node, file: str, *, limit_s: float = 60) -> list[dict[str, Any]]:
    """What the real Guix makes of a list of machines."""
    node.install("/opt/evaluate.scm", EVALUATE)
    said = node.run("guix", "repl", "--", "/opt/evaluate.scm", file, limit_s=limit_s).stdout
    return [dict(zip(FIELDS, _plain(datum), strict=True)) for datum in read_all(said, "guix")]


def _plain(datum: Datum) -> Any:
    if not isinstance(datum.value, tuple):
        return datum.value
    items = tuple(map(_plain, datum.value))
    return "".join(map(chr, items[1:])) if items[:1] == ("text",) else items


@settings(max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
@given(st.lists(any_offers(), min_size=5, max_size=20))
def test_guile_reads_whatever_goes_in(node_a: Node, offers: list[Offer]) -> None:
    node_a.install("/opt/machines.scm", render_guix(offers))
    found = evaluate(node_a, "/opt/machines.scm")
    expected = [without_name(offer) for offer in offers]
    assert [fields | {"overload_threshold": fields["overload_threshold"] or None} for fields in found] == expected


def test_guix_counts_the_machines(node_a: Node) -> None:
    offers = [make_offer(port=1), make_offer(port=2), make_offer(host="localhost", port=2)]
    for count in (0, 1, 3):
        node_a.install("/opt/machines.scm", render_guix(offers[:count]))
        said = node_a.run("guix", "offload", "status", "/opt/machines.scm", status=None).stderr
        assert f"getting status of {count} build machines" in said


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> World:
    """A user of ours with a remote machine for Guix."""
    made = make_world()
    folder = made.root / "config/offload/machines"
    folder.mkdir(parents=True)
    remote = f"kind: ssh\nhost: far.invalid\nsystems: [aarch64-linux]\nhost-key: {KEY}\nprivate-key: /k\n"
    (folder / "far.yaml").write_text(f"{remote}daemons: [guix]\nspeed: 2.5\n")
    made.machine("vm", "daemons: [guix]\nwarm: 0\n")
    return made


def test_a_live_list_is_what_runs_when_it_is_read(world: World, make_node: MakeNode) -> None:
    node = make_node("live", shared=[world.root])
    file = world.root / "live.scm"
    world.run("machine", "export", "--format", "guix", "--live", "-o", file)
    assert evaluate(node, str(file)) == []  # no daemon
    world.run("machine", "list")
    (far,) = evaluate(node, str(file))
    assert (far["host"], far["speed"], far["systems"], far["private_key"]) == ("far.invalid", 2.5, ("aarch64-linux",), "/k")
    # A copy of the key that guix-daemon can read is taken instead.
    node.install("/etc/guix/offload/ssh/far", "")
    assert [found["private_key"] for found in evaluate(node, str(file))] == ["/etc/guix/offload/ssh/far"]
    world.run("machine", "drain", "far")
    assert evaluate(node, str(file)) == []
    world.run("machine", "resume", "far")
    assert len(evaluate(node, str(file))) == 1
    (daemon,) = world.daemons()
    os.kill(daemon, signal.SIGSTOP)
    try:
        assert evaluate(node, str(file), limit_s=30) == []
    finally:
        os.kill(daemon, signal.SIGCONT)
    # It is somebody else's: then it is not even asked.
    text = file.read_text()
    file.write_text(text.replace(f"(define owner {os.geteuid()})", "(define owner 4711)"))
    assert evaluate(node, str(file)) == []
    file.write_text(text)
    assert len(evaluate(node, str(file))) == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_nix_builds_by_the_name_in_ssh_config(make_node: MakeNode) -> None:
    """What versions of Nix need that take no port in a URI."""
    here, there = make_node("here"), make_node("there")
    offer = offer_of(there, there.start_sshd(make_client_key(here)))
    there.start_nix_daemon(conf="trusted-users = root offloading\n")
    here.install("/root/.ssh/config", render_ssh_config(offer, "offload-there"), mode=0o600)
    assert offer.private_key == CLIENT_KEY
    lines = {
        "ssh": nix_line(offer, "ssh", alias="offload-there"),
        "ssh-ng": nix_line(offer, "ssh-ng", alias="offload-there"),
    }
    # Nothing is built or fetched here.
    alone = ["--option", "max-jobs", "0", "--option", "substitute", "false", "--option", "require-sigs", "false"]
    for name, line in lines.items():
        built = nix_build(here, f"by-{name}", "echo here > $out", "--builders", line, *alone).stdout.strip()
        assert there.path(built).exists(), name
        assert here.path(built).exists(), name
    wrong = nix_line(offer.model_copy(update={"host_key": KEY}), "ssh-ng", alias="offload-there")
    failed = nix_build(here, "by-wrong", "echo > $out", "--builders", wrong, *alone, status=None)
    assert failed.returncode != 0
    assert "ost key verification failed" in failed.stderr
