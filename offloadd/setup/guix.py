"""Guix on this host and our machines trust each other, as the manual's service `virtual-build-machine` has them do.

Everything of this host is in Guix's configuration directory:

    signing-key.{pub,sec}       this host's, when it has none
    acl                         our machines' keys in it
    machines.scm                includes ours; the user's own text stays
    offload/machines.scm        ours, live
    offload/ssh/MACHINE         a copy of the key to log in with, for whoever runs guix-daemon
    offload/hook                for GUIX= of guix-daemon

and what a machine gets is below etc/guix of its secret root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.errors import NotFoundError
from offloadd.guix.acl import ACL, COMMENTS, Acl, open_acl
from offloadd.guix.files import Owner, read_small, refuse_link
from offloadd.guix.key import PRIVATE_KEY, PUBLIC_KEY, PublicKey, make_signing_key, read_public_key
from offloadd.guix.trust import COMMENT, keys_for_guest
from offloadd.setup.include import include
from offloadd.setup.steps import Step, file_step, read_text

MAX_KEY = 64 * 1024
DROP_IN = Path("/etc/systemd/system/guix-daemon.service.d/offload.conf")
_UNITS = [
    Path(folder) / "guix-daemon.service" for folder in ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
]


@dataclass(frozen=True, kw_only=True)
class GuixHost:
    """This host's side."""

    directory: Path
    """Guix's configuration directory."""
    owner: Owner | None
    """Whoever runs guix-daemon and has to read the keys; None: we."""
    live: str
    """The text of our machines.scm."""
    hook: bytes
    """The program for GUIX=."""

    @property
    def offload(self) -> Path:
        return self.directory / "offload"

    @property
    def hook_path(self) -> Path:
        return self.offload / "hook"


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A machine's side."""

    machine: str
    client_key: Path
    secret_root: Path | None
    """None: a remote host, whose files are not ours."""


def copied_key(directory: Path, machine: str) -> Path:
    """Where the copy of a machine's client key is, in Guix's configuration directory."""
    return directory / "offload/ssh" / machine


def guix_steps(host: GuixHost, guests: Sequence[Guest], *, drop_in: Path | None = None) -> list[Step]:
    """All that is to be done, in this order.

    Args:
        drop_in: the file that tells systemd of the hook; None: somebody else does.
    """
    steps = [_keys_step(host.directory, host.owner)]
    for guest in guests:
        if guest.secret_root is not None:
            inside = guest.secret_root / "etc/guix"
            steps.append(_keys_step(inside, None, guest.machine))
            steps.append(_guest_acl_step(host, inside, guest.machine))
            steps.append(_host_acl_step(host, inside, guest.machine))
        steps.append(_client_key_step(host, guest))
    ours, file = host.offload / "machines.scm", host.directory / "machines.scm"
    steps.append(file_step(ours, lambda: host.live.encode()))
    steps.append(file_step(host.hook_path, lambda: host.hook, 0o755))
    steps.append(file_step(file, lambda: include(read_text(file), ours, file).encode("utf-8", "surrogateescape")))
    if drop_in is not None:
        unit = f'# Made by offload: a change is lost.\n[Service]\nEnvironment="GUIX={_unit_word(host.hook_path)}"\n'
        steps.append(file_step(drop_in, unit.encode))
    return steps


def has_unit() -> bool:
    """Whether systemd of this host knows guix-daemon."""
    return any(unit.exists() for unit in _UNITS)


def _unit_word(path: Path) -> str:
    """As systemd.exec(5) has it in quotes."""
    return str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


def _keys_step(directory: Path, owner: Owner | None, machine: str = "") -> Step:
    # In this order: undone in the other.
    paths = directory / PRIVATE_KEY, directory / PUBLIC_KEY

    def do() -> tuple[str, ...]:
        make_signing_key(directory, owner)
        return ()

    return Step(machine=machine, paths=paths, pending=lambda: [path for path in paths if not path.exists()], do=do)


def _client_key_step(host: GuixHost, guest: Guest) -> Step:
    """ssh of Guix does not care, but nobody else is to read it."""
    target = copied_key(host.directory, guest.machine)
    return file_step(target, lambda: read_small(guest.client_key, MAX_KEY), 0o600, host.owner, guest.machine)


def _guest_acl_step(host: GuixHost, inside: Path, machine: str) -> Step:
    return _acl_step(inside / ACL, lambda: keys_for_guest(host.directory), None, machine, "")


def _host_acl_step(host: GuixHost, inside: Path, machine: str) -> Step:
    """This host takes what the guest signed."""
    return _acl_step(
        host.directory / ACL, lambda: [read_public_key(inside / PUBLIC_KEY)], host.owner, machine, f"{COMMENT}{machine}"
    )


def _acl_step(path: Path, keys: Callable[[], list[PublicKey]], owner: Owner | None, machine: str, comment: str) -> Step:
    def pending() -> list[Path]:
        acl = Acl.read(path)
        try:
            missing = not path.exists() or any(acl.find(key) is None for key in keys())
        except NotFoundError:
            refuse_link(path)  # a key that is still to be made is not in it
            raise
        if not missing:
            return []
        refuse_link(path)
        return [path, path.with_name(COMMENTS)] if comment else [path]

    def intended() -> Iterable[str]:
        acl = Acl.read(path)
        return [key.fingerprint for key in keys() if acl.find(key) is None]

    def do() -> Iterable[str]:
        wanted = keys()
        with open_acl(path, owner) as acl:
            return [key.fingerprint for key in wanted if acl.authorize(key, comment)]

    return Step(machine=machine, paths=(path,), pending=pending, do=do, intended=intended)
