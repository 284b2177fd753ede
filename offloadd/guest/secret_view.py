"""`offload secrets show`: what a machine's secrets are, without a word of them."""

from __future__ import annotations

import base64
import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from offloadd.errors import HostError, OffloadError
from offloadd.guest.guix_secrets import GUIX
from offloadd.guest.secret_root import SecretRoot
from offloadd.guix.acl import ACL, Acl
from offloadd.guix.key import PUBLIC_KEY, read_public_key

MAX_FILES = 1000
_MAX_KEYS = 1 << 20
"""Bytes of a file with public keys."""
_SSH_KEY = re.compile(rb"(?:^|\s)(?:ssh|ecdsa|sk)-[a-z0-9@.-]+ ([A-Za-z0-9+/]+=*)(?:\s|$)")


def describe_secrets(secrets: SecretRoot) -> dict[str, Any]:
    """Files with their modes, dates (seconds since 1970) and fingerprints; those of private keys are their public halves'.

    Raises:
        HostError: the secret root cannot be read.
    """
    try:
        inside = [path for path in sorted(secrets.root.rglob("*")) if not path.is_dir()][:MAX_FILES]
        client = [secrets.client_key, secrets.client_key.with_name(secrets.client_key.name + ".pub")]
        return {
            "machine": secrets.machine,
            "root": str(secrets.root),
            "files": [_describe(path, "/" + str(path.relative_to(secrets.root))) for path in inside],
            "client": [_describe(path, "") for path in client if path.exists()],
            "old": [str(path) for path in sorted(secrets.folder.glob("old-*"))],
        }
    except OSError as exc:
        raise HostError(f"cannot be read: {exc.strerror}", subject=str(exc.filename or secrets.root)) from exc


def _describe(path: Path, name: str) -> dict[str, Any]:
    """`name` is the guest's for it; empty: it stays here."""
    about = path.stat()
    return {
        "path": str(path),
        "name": name,
        "mode": f"{about.st_mode & 0o7777:04o}",
        "changed": about.st_mtime,
        "fingerprints": _fingerprints(path, name),
    }


def _fingerprints(path: Path, name: str) -> list[str]:
    """Of no key where the file has none, or is not what its name says: then whoever starts the machine is told so."""
    with suppress(OffloadError, ValueError):
        if name == f"/{GUIX}/{PUBLIC_KEY}":
            return [read_public_key(path).fingerprint]
        if name == f"/{GUIX}/{ACL}":
            return [entry.key.fingerprint for entry in Acl.read(path).entries if entry.key]
        if path.suffix == ".pub" or path.parent.name == "authorized_keys.d":
            with path.open("rb") as file:
                found = (_SSH_KEY.search(line) for line in file.read(_MAX_KEYS).splitlines())
            return [ssh_fingerprint(base64.b64decode(match[1])) for match in found if match]
    return []


def ssh_fingerprint(key: bytes) -> str:
    """As `ssh-keygen -l` prints it (OpenSSH, sshkey_fingerprint)."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
