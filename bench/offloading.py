"""One trivial derivation from end to end: offloaded by the bare Guix and Nix, and through our hooks, to the same machine.

Two nodes (chroots with the real daemons) send it, one that has our list of machines and one that has our hooks instead.  The
target is a node, where little but the hook makes a difference, or a virtual machine, as in real life.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from subprocess import CompletedProcess

from bench.hooks import hook_text
from bench.measure import BenchError, Budget, Row, Series, in_turn
from bench.workplace import Workplace, free_ports
from offloadd.errors import OffloadError
from offloadd.guix.acl import open_acl
from offloadd.guix.files import store_owner
from offloadd.guix.key import PublicKey, make_signing_key
from offloadd.process import Progress
from tests.conftest import REPOSITORY
from tests.interop.derivations import guix_build, nix_build
from tests.interop.node import Node, open_node, open_root
from tests.interop.offers import CLIENT_KEY, make_client_key

SHARE = 1.05
"""What a hook may add."""
HOOK_S = 0.15
"""Where 5 % are less than the start of an interpreter."""
BUILD_LIMIT_S = 150
LIMIT_S = 280
"""For all of it, but for what the cache lacks; no further round begins when it would take longer."""
_GUIX = "/etc/guix"
_NIX_MACHINES = "/etc/nix/offload.machines"
_NODE, _VM = "bench-node", "bench-guix"
_TITLES = {_NODE: "a node", _VM: "a VM"}
_FEATURES = {_NODE: "big-parallel", _VM: "benchmark"}
"""What a derivation for that target asks for; such that Nix has it in the target, too."""

_number = count()


@dataclass(frozen=True)
class Bench:
    """Who sends."""

    place: Workplace
    root: Path
    plain: Node
    """Its daemons have our list of machines."""
    hooked: Node
    """Its daemons have our hooks, and no machines of their own."""
    keys: tuple[PublicKey, PublicKey]

    def list_machine(self, name: str) -> None:
        """Put this one on the list, and no other one."""
        file = self.place.folder / "exported"
        for form, inside in (("guix", f"{_GUIX}/machines.scm"), ("nix", _NIX_MACHINES)):
            file.unlink(missing_ok=True)
            self.place.run("machine", "export", "--format", form, "-o", str(file), name)
            self.plain.install(inside, file.read_bytes())

    def trust(self, directory: Path) -> None:
        """Both sides take what the other one has signed.

        Args:
            directory: Guix's configuration directory of a target; its key is made.
        """
        store = directory.parent.parent / "gnu/store"
        key = make_signing_key(directory, store_owner(store)).public
        for node in (self.plain, self.hooked):
            with open_acl(node.path(f"{_GUIX}/acl")) as acl:
                acl.authorize(key)
        with open_acl(directory / "acl") as acl:
            for sender in self.keys:
                acl.authorize(sender)


def measure_offloading(place: Workplace, tell: Progress, *, quick: bool) -> list[Row]:
    """The rows of both targets.

    Raises:
        BenchError: something failed that had begun well.
    """
    share = 4 if quick else 1
    end = time.monotonic() + LIMIT_S / share
    with ExitStack() as stack:
        try:
            tell("the nodes", None)
            bench = stack.enter_context(_open_bench(place))
        except (BenchError, OffloadError, OSError) as exc:
            return [_row(daemon, name, why_not=str(exc)) for name in _TITLES for daemon in ("guix", "nix")]
        _add_node(bench, stack)
        rows = [
            _measure(bench, "guix", _NODE, Budget(35 / share, least=3, most=8), tell),
            _measure(bench, "nix", _NODE, Budget(10 / share, least=3, most=20), tell),
        ]
        try:
            tell("the virtual machine", None)
            place.run("image", "build", "debian-guix", limit_s=900)
        except BenchError as exc:
            return [*rows, *(_row(daemon, _VM, why_not=str(exc)) for daemon in ("guix", "nix"))]
        _add_vm(bench, stack)
        rows += [
            _measure(bench, "nix", _VM, Budget(15 / share, least=5, most=15), tell),
            _measure(bench, "guix", _VM, Budget(end - time.monotonic(), least=1, most=5), tell),
        ]
    return rows


def _measure(bench: Bench, daemon: str, target: str, budget: Budget, tell: Progress) -> Row:
    row = _row(daemon, target)
    assert row.base is not None
    senders = {"plain": (bench.plain, row.base), "hook": (bench.hooked, row.ours)}
    # What all derivations need goes over once; for Guix to a virtual machine, which takes most of a minute, that must do.
    for node in (bench.plain,) if (daemon, target) == ("guix", _VM) else (bench.plain, bench.hooked):
        tell(f"{daemon} to {_TITLES[target]}, the first time", None)
        _offload(node, daemon, target)
    for number in budget.rounds():
        for name in in_turn(number, *senders):
            tell(f"{daemon} to {_TITLES[target]}, round {number + 1}, {name}", None)
            node, series = senders[name]
            series.seconds.append(_offload(node, daemon, target))
    return row


def _row(daemon: str, target: str, *, why_not: str = "") -> Row:
    call, base = ("guix build", "guix offload") if daemon == "guix" else ("nix-build", "nix __build-remote")
    # To a node Nix takes a fraction of a second.
    alone = daemon == "nix" and target == _NODE
    return Row(
        name=f"{call} on {_TITLES[target]}, through our hook",
        compares=f"one new trivial derivation, from the shell and back, through `offload {daemon}-hook` : with plain `{base}`",
        ours=Series("through our hook"),
        base=Series(f"plain {base}"),
        relation="difference" if alone else "ratio",
        target=HOOK_S if alone else SHARE,
        why_not=why_not,
    )


def _offload(node: Node, daemon: str, target: str) -> float:
    """Seconds that one derivation takes that nobody has built yet."""
    script = f"echo {next(_number)} >$out"
    if daemon == "guix":
        return _time(
            lambda: guix_build(node, "bench", script, features=_FEATURES[target], limit_s=BUILD_LIMIT_S), "offloading '/gnu"
        )
    environment = {"NIX_REMOTE": "daemon"}

    def build() -> CompletedProcess[str]:
        return nix_build(
            node, "bench", script, "--max-jobs", "0", features=[_FEATURES[target]], env=environment, limit_s=BUILD_LIMIT_S
        )

    return _time(build, "on 'ssh-ng://")


def _time(build: Callable[[], CompletedProcess[str]], proof: str) -> float:
    """How long it takes; what it says must have `proof` in it."""
    began = time.monotonic()
    with _told():
        done = build()
    took = time.monotonic() - began
    if proof not in done.stderr:
        raise BenchError(f"it was not offloaded:\n{done.stderr[-2000:]}")
    return took


@contextmanager
def _told() -> Iterator[None]:
    """What a node says when something in it fails is for tests."""
    try:
        yield
    except (AssertionError, subprocess.TimeoutExpired) as exc:
        raise BenchError(str(exc)[-3000:]) from exc


@contextmanager
def _open_bench(place: Workplace) -> Iterator[Bench]:
    """The senders, which know of no machine."""
    if os.geteuid() != 0:
        raise BenchError("nodes are made of namespaces with many users: root alone can do that")
    with ExitStack() as stack:
        with _told():
            root = stack.enter_context(open_root())
            nodes = [stack.enter_context(open_node(root, name, [place.folder, REPOSITORY])) for name in ("plain", "hooked")]
            keys = [make_signing_key(node.path(_GUIX), store_owner(node.path("/gnu/store"))).public for node in nodes]
            plain, hooked = nodes
            plain.start_guix_daemon(unprivileged=False)
            plain.start_nix_daemon(conf=f"builders = @{_NIX_MACHINES}\n")
            guix, nix = (_install_hook(hooked, place, name) for name in ("guix-hook", "nix-hook"))
            hooked.start_guix_daemon(unprivileged=False, env={"GUIX": guix})
            hooked.start_nix_daemon(conf=f"build-hook = {nix}\nbuilders =\n")
        yield Bench(place, root, plain, hooked, (keys[0], keys[1]))


def _install_hook(node: Node, place: Workplace, name: str) -> str:
    """For the node's own interpreter, which has nothing but its own library."""
    file = f"/opt/{name}"
    node.install(file, hook_text(place, name, "/usr/bin/python3"), mode=0o755)
    return file


def _add_node(bench: Bench, stack: ExitStack) -> None:
    """The target that is a node."""
    with _told():
        node = stack.enter_context(open_node(bench.root, "target"))
        key = make_client_key(bench.plain)
        for suffix in ("", ".pub"):
            private = bench.plain.path(CLIENT_KEY + suffix)
            bench.hooked.install(CLIENT_KEY + suffix, private.read_bytes(), mode=private.stat().st_mode & 0o777)
        host_key = node.start_sshd(key)
        bench.trust(node.path(_GUIX))
        node.start_guix_daemon()
        node.start_nix_daemon()
    bench.place.add_file(
        _NODE,
        f"kind: ssh\nhost: 127.0.0.1\nport: {node.ssh_port}\nuser: offloading\nhost-key: {host_key}\n"
        f"private-key: {CLIENT_KEY}\nsystems: [x86_64-linux]\n{_more(_NODE)}",
    )
    bench.list_machine(_NODE)


def _add_vm(bench: Bench, stack: ExitStack) -> None:
    """The target that is a virtual machine: it runs, its user has started it."""
    place = bench.place
    ssh, _ = free_ports()
    place.add_file(_VM, f"kind: build-vm\nimage: debian-guix\nport-forwardings: {{{ssh}: 22}}\n{_more(_VM)}")
    bench.list_machine(_VM)  # its keys are made
    directory = place.paths.secrets / f"{_VM}/root{_GUIX}"
    directory.mkdir(parents=True, exist_ok=True)
    bench.trust(directory)
    place.run("vm", "start", _VM, limit_s=300)
    stack.callback(place.run, "vm", "stop", _VM)


def _more(target: str) -> str:
    return f"daemons: [guix, nix]\nfeatures: [{_FEATURES[target]}]\noverload-threshold: null\n"
