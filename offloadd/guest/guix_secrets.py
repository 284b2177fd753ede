"""What a guest's own guix-daemon needs of its secret root: a signing key, and the list of those whose store items it takes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from offloadd.errors import OffloadError
from offloadd.guix.acl import ACL, Acl, open_acl
from offloadd.guix.files import configuration_directory, remove
from offloadd.guix.key import PRIVATE_KEY, PUBLIC_KEY, PublicKey, make_signing_key, read_public_key
from offloadd.guix.trust import keys_for_guest

GUIX = "etc/guix"
"""In a secret root."""
FILES = (PRIVATE_KEY, PUBLIC_KEY, ACL)


def ensure_guix_secrets(root: Path) -> None:
    """Make what is missing of them, also the guest's own key in its list; what is there stays.

    Args:
        root: the secret root.
    Raises:
        UsageError: the public half of the key is there without the private one.
        ConfigError: a file that is there is no key or no list, or the two halves are not of one key.
        NotAllowedError, HostError: a file cannot be read or written.
    """
    folder = root / GUIX
    own = make_signing_key(folder).public
    if (folder / ACL).exists():
        # A link is to somebody else's list: that stays as it is.
        if not (folder / ACL).is_symlink() and Acl.read(folder / ACL).find(own) is None:
            with open_acl(folder / ACL) as acl:
                acl.authorize(own)
        return
    hosts: list[PublicKey] = []
    # A host without Guix, or whose list is wrong or private: `offload guix setup` brings both together, or says why not.
    with suppress(OffloadError):
        hosts = keys_for_guest(configuration_directory())
    with open_acl(folder / ACL) as acl:
        for key in hosts:
            acl.authorize(key)


def renew_signing_key(root: Path) -> str:
    """Make a new key in the place of the one that is there, also in the guest's own list.

    Returns:
        The fingerprint of the old one.

    Raises:
        NotFoundError: there is none.
        ConfigError, NotAllowedError, HostError: as `ensure_guix_secrets`.
    """
    folder = root / GUIX
    old = read_public_key(folder / PUBLIC_KEY)
    # In this order: whatever stops us in between, what is left is completed by `ensure_guix_secrets`, and only a key that is
    # still there is in the list.
    if (folder / ACL).exists():
        with open_acl(folder / ACL) as acl:
            if acl.find(old) is not None:
                acl.revoke(old.fingerprint)
    remove(folder / PUBLIC_KEY)
    remove(folder / PRIVATE_KEY)
    ensure_guix_secrets(root)
    return old.fingerprint
