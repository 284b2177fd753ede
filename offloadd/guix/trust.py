"""Whose store items a guest of this host takes."""

from __future__ import annotations

from pathlib import Path

from offloadd.guix.acl import ACL, Acl
from offloadd.guix.key import PUBLIC_KEY, PublicKey, read_public_key

COMMENT = "offload: "
"""Begins the comment of a machine's key in this host's ACL."""


def keys_for_guest(directory: Path) -> list[PublicKey]:
    """What this host signed, and what this host takes itself; not what our other guests sign.

    The last one that is put into an ACL is the first of its list: here that is this host's own.

    Args:
        directory: Guix's configuration directory of this host.
    Raises:
        NotFoundError: this host has no key.
        ConfigError, NotAllowedError, HostError: a key or the ACL is none, or cannot be read.
    """
    own = read_public_key(directory / PUBLIC_KEY)
    entries = Acl.read(directory / ACL).entries
    others = [entry.key for entry in entries if entry.key and entry.authorizes and not entry.comment.startswith(COMMENT)]
    return [*(key for key in reversed(others) if key != own), own]
