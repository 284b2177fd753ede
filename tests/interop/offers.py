"""How one node is offered to another."""

from __future__ import annotations

from offloadd.guix.files import store_owner
from offloadd.model.offer import Offer

from .node import USER, Node

CLIENT_KEY = "/etc/guix/offload/ssh/node"
"""The private half, as the node itself calls it."""


def make_client_key(node: Node) -> str:
    """Make a key to log in with, for the node's root and for its guix-daemon; the public half."""
    node.path(CLIENT_KEY).parent.mkdir(parents=True, exist_ok=True)
    node.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", CLIENT_KEY)
    owner = store_owner(node.path("/gnu/store"))
    assert owner is not None
    # OpenSSH refuses a key that others can read, and root reads everything.
    node.run("chown", f"{owner.uid}:{owner.gid}", CLIENT_KEY)
    return node.path(f"{CLIENT_KEY}.pub").read_text().strip()


def offer_of(node: Node, host_key: str) -> Offer:
    """A node whose sshd runs."""
    return Offer(
        machine=node.name,
        host="127.0.0.1",
        port=node.ssh_port,
        user=USER,
        host_key=host_key,
        private_key=CLIENT_KEY,
        systems=("x86_64-linux",),
        parallel_builds=2,
        speed=1.5,
        features=("kvm", "big-parallel"),
        # Others work on the same host.
        overload_threshold=None,
        daemons=("guix", "nix"),
        state="running",
    )
