"""How the Guix of two nodes trust each other."""

from __future__ import annotations

from pathlib import Path

from offloadd.guix.acl import ACL, open_acl
from offloadd.guix.key import PUBLIC_KEY, read_public_key

from .node import Node

GUIX = "/etc/guix"
"""A node's configuration directory."""


def trust_each_other(sender: Path, builder: Node) -> None:
    """Each takes what the other has signed.

    Args:
        sender: Guix's configuration directory of the one that sends derivations; its signing key is there.
        builder: the one that builds them; its Guix makes its own signing key.
    """
    builder.run("guix", "archive", "--generate-key")
    there = builder.path(GUIX)
    for takes, signs in ((there, sender), (sender, there)):
        with open_acl(takes / ACL) as acl:
            acl.authorize(read_public_key(signs / PUBLIC_KEY))
