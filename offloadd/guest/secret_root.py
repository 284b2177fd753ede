"""The secret root of a machine: the directory whose files are copied into the guest at boot, paths and modes kept.

Made at first use, and never overwritten: SSH host keys for the guest, and the public half of a fresh client key for the account
`offloading`.  The private half stays beside it, outside the root, as Guix keeps it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from offloadd.errors import HostError
from offloadd.paths import make_private

ACCOUNT = "offloading"
HOST_KEY_TYPES = {"ed25519": "ssh-ed25519", "ecdsa": "ecdsa-sha2-nistp256"}


@dataclass(frozen=True, kw_only=True)
class SecretRoot:
    """Where one machine's secrets are; holds no secret itself."""

    machine: str
    root: Path
    client_key: Path

    @property
    def host_keys(self) -> list[Path]:
        """The public halves of the guest's host keys."""
        return [self.root / f"etc/ssh/ssh_host_{kind}_key.pub" for kind in HOST_KEY_TYPES]


def ensure_secret_root(machine: str, secrets: Path, root: Path | None = None) -> SecretRoot:
    """Make what is missing of a machine's secrets.

    Args:
        secrets: the directory for all machines' secrets.
        root: the machine's own `secret-root`, when its file names one.
    Raises:
        HostError: a file cannot be written or a key not be read.
    """
    try:
        folder = make_private(make_private(secrets) / machine)
        found = SecretRoot(machine=machine, root=root or folder / "root", client_key=folder / "id_ed25519")
        make_private(found.root)
        ssh = found.root / "etc/ssh"
        (ssh / "authorized_keys.d").mkdir(mode=0o755, parents=True, exist_ok=True)
        for kind, algorithm in HOST_KEY_TYPES.items():
            _ensure_key(ssh / f"ssh_host_{kind}_key", algorithm, f"{machine} (offload)")
        public = _ensure_key(found.client_key, "ssh-ed25519", f"offloading@{machine}")
        _ensure_line(ssh / "authorized_keys.d" / ACCOUNT, public)
    except OSError as exc:
        raise HostError(f"cannot write the secrets: {exc.strerror}", subject=str(exc.filename or secrets)) from exc
    return found


def _ensure_key(path: Path, algorithm: str, comment: str) -> str:
    """The public key of `path`, which is made together with its `.pub` when it is not there."""
    public_path = path.with_name(path.name + ".pub")
    if not path.exists():
        key = asyncssh.generate_private_key(algorithm, comment=comment)
        _write_new(path, key.export_private_key(), 0o600)
        public_path.unlink(missing_ok=True)
    if not public_path.exists():
        try:
            key = asyncssh.read_private_key(path)
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
            # Without the cause: nothing of a private key belongs in a message.
            raise HostError("is no private key without a passphrase", subject=str(path)) from None
        _write_new(public_path, key.export_public_key(), 0o644)
    try:
        return asyncssh.read_public_key(public_path).export_public_key().decode().strip()
    except asyncssh.KeyImportError as exc:
        hint = "remove it: it is made again from the private one"
        raise HostError("is no public key", subject=str(public_path), hint=hint) from exc


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """The right mode from the first moment, and complete or absent."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(content)
    new.replace(path)


def _ensure_line(path: Path, line: str) -> None:
    """The user may have authorized further keys there: they stay."""
    text = path.read_bytes() if path.exists() else b""
    if line.split()[1].encode() not in text.split():
        between = b"" if not text or text.endswith(b"\n") else b"\n"
        _write_new(path, text + between + line.encode() + b"\n", 0o444)
