"""The secret root of a machine: the directory whose files are copied into the guest at boot, paths and modes kept.

Made at first use, and never overwritten: SSH host keys for the guest, and the public half of a fresh client key for the account
`offloading`.  The private half stays beside it, outside the root, as Guix keeps it.  A childhurd gets Guix's keys too.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from offloadd.errors import HostError
from offloadd.guest.guix_secrets import ensure_guix_secrets
from offloadd.guest.secret_service import UNFINISHED
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import VmMachine
from offloadd.paths import make_private

ACCOUNT = "offloading"
AUTHORIZED_KEYS = f"etc/ssh/authorized_keys.d/{ACCOUNT}"
"""In a secret root."""
HOST_KEY_TYPES = {"ed25519": "ssh-ed25519", "ecdsa": "ecdsa-sha2-nistp256"}


@dataclass(frozen=True, kw_only=True)
class SecretRoot:
    """Where one machine's secrets are; holds no secret itself."""

    machine: str
    root: Path
    client_key: Path
    """Where it is; it may not be there when the guest has no account for us."""
    has_account: bool = True

    @property
    def folder(self) -> Path:
        """What we have of this machine beside its root, which may be elsewhere."""
        return self.client_key.parent

    @property
    def authorized_keys(self) -> Path:
        return self.root / AUTHORIZED_KEYS

    @property
    def host_keys(self) -> list[Path]:
        """The public halves of the guest's host keys."""
        return [self.root / f"etc/ssh/ssh_host_{kind}_key.pub" for kind in HOST_KEY_TYPES]

    @property
    def withheld(self) -> tuple[str, ...]:
        """Files of the root that the guest does not get, by the names that they would have there."""
        return () if self.has_account else (f"/{AUTHORIZED_KEYS}",)


def has_account(machine: VmMachine) -> bool:
    """Whether its guest has an account for us."""
    return not isinstance(machine, Childhurd) or machine.offloading


def secrets_of(machine: VmMachine, secrets: Path) -> SecretRoot:
    """Make what is missing of the secrets that this machine needs to be started.

    Args:
        secrets: the directory for all machines' secrets.
    Raises:
        HostError, NotAllowedError: a file cannot be written or a key not be read.
        ConfigError, UsageError: a key of Guix that is there is none, or half of one.
    """
    root = Path(machine.secret_root) if machine.secret_root else None
    found = ensure_secret_root(machine.name, secrets, root, account=has_account(machine))
    if isinstance(machine, Childhurd) and machine.offloading:
        ensure_guix_secrets(found.root)
    return found


def find_secret_root(machine: str, secrets: Path, root: Path | None = None, *, account: bool = True) -> SecretRoot:
    """Where they are, or would be; nothing is made.  Arguments as for `ensure_secret_root`."""
    folder = secrets / machine
    return SecretRoot(machine=machine, root=root or folder / "root", client_key=folder / "id_ed25519", has_account=account)


def ensure_secret_root(machine: str, secrets: Path, root: Path | None = None, *, account: bool = True) -> SecretRoot:
    """Make what is missing of a machine's secrets.

    Args:
        secrets: the directory for all machines' secrets.
        root: the machine's own `secret-root`, when its file names one.
        account: whether its guest has one for us, which needs a key.
    Raises:
        HostError: a file cannot be written or a key not be read.
    """
    found = find_secret_root(machine, secrets, root, account=account)
    try:
        make_private(make_private(secrets) / machine)
        make_private(found.root)
        with _alone(found.folder):
            _ensure_keys(found)
    except OSError as exc:
        raise HostError(f"cannot write the secrets: {exc.strerror}", subject=str(exc.filename or secrets)) from exc
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that find a key missing at the same time would put one's public half beside the other's private one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _ensure_keys(found: SecretRoot) -> None:
    ssh = found.root / "etc/ssh"
    (ssh / "authorized_keys.d").mkdir(mode=0o755, parents=True, exist_ok=True)
    for kind, algorithm in HOST_KEY_TYPES.items():
        _ensure_key(ssh / f"ssh_host_{kind}_key", algorithm, f"{found.machine} (offload)")
    if found.has_account:
        public = _ensure_key(found.client_key, "ssh-ed25519", f"{ACCOUNT}@{found.machine}")
        _ensure_line(found.authorized_keys, public)


def _ensure_key(path: Path, algorithm: str, comment: str) -> str:
    """The public key of `path`, which is made together with its `.pub` when it is not there."""
    public_path = path.with_name(path.name + ".pub")
    if not path.exists():
        # First: beside a new private key it would be taken for its other half.
        public_path.unlink(missing_ok=True)
        key = asyncssh.generate_private_key(algorithm, comment=comment)
        write_new(path, key.export_private_key(), 0o600)
    if not public_path.exists():
        try:
            key = asyncssh.read_private_key(path)
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
            # Without the cause: nothing of a private key belongs in a message.
            raise HostError("is no private key without a passphrase", subject=str(path)) from None
        write_new(public_path, key.export_public_key(), 0o644)
    try:
        return asyncssh.read_public_key(public_path).export_public_key().decode().strip()
    except asyncssh.KeyImportError as exc:
        hint = "remove it: it is made again from the private one"
        raise HostError("is no public key", subject=str(public_path), hint=hint) from exc


def write_new(path: Path, content: bytes, mode: int) -> None:
    """The right mode from the first moment, and complete or absent, also after a power loss."""
    fd, new = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, mode)
            file.flush()
            os.fsync(fd)
        Path(new).replace(path)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _ensure_line(path: Path, line: str) -> None:
    """The user may have authorized further keys there: they stay."""
    text = path.read_bytes() if path.exists() else b""
    if line.split()[1].encode() not in text.split():
        between = b"" if not text or text.endswith(b"\n") else b"\n"
        write_new(path, text + between + line.encode() + b"\n", 0o444)
