"""OpenSSH's own programs, logged in to a guest with the key and host keys that it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_cli.ssh import ACCOUNT, known_hosts_text, ssh_argv


@dataclass(frozen=True)
class Login:
    """How to reach one guest."""

    ssh: tuple[str, ...]
    """The command line of `ssh`; a command may follow."""
    scp: tuple[str, ...]
    """The command line of `scp`; what to copy follows, with `remote` before paths in the guest."""
    remote: str = f"{ACCOUNT}@127.0.0.1:"


def make_login(machine: Mapping[str, Any], folder: Path) -> Login:
    """Write the guest's host keys into `folder`.

    Args:
        machine: `name`, `ssh_port`, `client_key` and `host_keys`, as `offload vm show --json` has them.
    """
    known_hosts = folder / f"known-hosts-{machine['name']}"
    known_hosts.write_text(known_hosts_text(machine["name"], machine["host_keys"]))
    ssh = ssh_argv(machine, known_hosts, options=["-T", "-o", "BatchMode=yes"])
    # From its first option to the account: scp knows the same ones, but calls the port -P.
    options = ["-P" if word == "-p" else word for word in ssh[1:-2] if word != "-T"]
    return Login(ssh=tuple(ssh), scp=("scp", "-q", "-r", *options))
