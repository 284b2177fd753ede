"""`offload secrets init` and `rotate`: a machine's secrets are made, and exchanged for new ones."""

from __future__ import annotations

import stat
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from offloadd.errors import HostError, NotAllowedError, UsageError
from offloadd.guest.guix_secrets import FILES, GUIX, ensure_guix_secrets, renew_signing_key
from offloadd.guest.secret_root import SecretRoot, find_secret_root, has_account, secrets_of, write_new
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import VmMachine

SecretKind = Literal["host", "client", "guix"]
"""The guest's SSH host keys; the key that we log in with; Guix's signing key of the guest."""
SECRET_KINDS: tuple[SecretKind, ...] = get_args(SecretKind)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What has been exchanged; holds no secret."""

    kinds: tuple[SecretKind, ...]
    backup: Path
    """The directory with the old ones."""
    old_signing_key: str | None = None
    """The fingerprint of the guest's old Guix key, which this host may still trust."""


def wanted_kinds(machine: VmMachine) -> tuple[SecretKind, ...]:
    """The secrets that this machine has to do with."""
    wanted: list[SecretKind] = ["host"]
    if has_account(machine):
        wanted.append("client")
    if "guix" in machine.daemons or (isinstance(machine, Childhurd) and machine.offloading):
        wanted.append("guix")
    return tuple(wanted)


def secret_root_of(machine: VmMachine, secrets: Path) -> SecretRoot:
    """Where this machine's secrets are, or would be; nothing is made."""
    root = Path(machine.secret_root) if machine.secret_root else None
    return find_secret_root(machine.name, secrets, root, account=has_account(machine))


def init_secrets(machine: VmMachine, secrets: Path) -> SecretRoot:
    """Make whatever is missing of the machine's secrets; what is there stays.

    Args:
        secrets: the directory for all machines' secrets.
    Raises:
        HostError, NotAllowedError, ConfigError, UsageError: as `secrets_of` and `ensure_guix_secrets`.
    """
    found = secrets_of(machine, secrets)
    if "guix" in wanted_kinds(machine):
        ensure_guix_secrets(found.root)
    return found


def rotate_secrets(machine: VmMachine, secrets: Path, kinds: Collection[SecretKind], now: datetime) -> Rotation:
    """Put new secrets in the place of the old ones, which are kept beside.

    Stopped in the middle it leaves old ones or none, and what is missing is made at the next start.

    Args:
        kinds: which; those that the machine has nothing to do with are left out.
        now: names the directory with the old ones.
    Raises:
        UsageError: the machine has none of these.
        NotAllowedError: they were rotated in this very second.
        HostError, ConfigError: a file cannot be read or written, or is no key.
    """
    chosen = tuple(kind for kind in wanted_kinds(machine) if kind in kinds)
    if not chosen:
        raise UsageError(f"has no secrets of the kind {', '.join(kinds)}", subject=machine.name)
    found = init_secrets(machine, secrets)
    try:
        backup = _back_up(found, [path for kind in chosen for path in _files(found, kind)], now)
        if "host" in chosen:
            for path in _files(found, "host"):
                path.unlink()
        if "client" in chosen:
            _forget_client_key(found)
    except OSError as exc:
        raise HostError(f"cannot rotate the secrets: {exc.strerror}", subject=str(exc.filename or found.root)) from exc
    signing_key = renew_signing_key(found.root) if "guix" in chosen else None
    init_secrets(machine, secrets)
    return Rotation(kinds=chosen, backup=backup, old_signing_key=signing_key)


def _files(found: SecretRoot, kind: SecretKind) -> list[Path]:
    if kind == "host":
        return [path for public in found.host_keys for path in (public.with_suffix(""), public)]
    if kind == "client":
        public = found.client_key.with_name(found.client_key.name + ".pub")
        return [found.client_key, public, found.authorized_keys]
    return [found.root / GUIX / name for name in FILES]


def _back_up(found: SecretRoot, files: Collection[Path], now: datetime) -> Path:
    backup = found.folder / f"old-{now.astimezone(UTC):%Y%m%dT%H%M%SZ}"
    try:
        backup.mkdir(mode=0o700, parents=True)
    except FileExistsError as exc:
        raise NotAllowedError("were rotated a moment ago", subject=f"the secrets of {found.machine}") from exc
    for path in files:
        kept = backup / path.name
        write_new(kept, path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
    return backup


def _forget_client_key(found: SecretRoot) -> None:
    """The old key is not to open the guest any more; further keys that its user has authorized stay."""
    private, public, authorized = _files(found, "client")
    blob = public.read_bytes().split()[1]
    lines = authorized.read_bytes().splitlines(keepends=True)
    write_new(authorized, b"".join(line for line in lines if blob not in line.split()), 0o444)
    private.unlink()
    public.unlink()
