"""OpenSSH's client, for a person in a machine.

Only the host keys that we gave to the guest are accepted; nothing of the user's own SSH configuration is used.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from offloadd.errors import HostError, NotFoundError

ACCOUNT = "offloading"


def run_ssh(machine: Mapping[str, Any], command: Sequence[str]) -> NoReturn:
    """Become an ssh that is logged in, or runs `command` as a shell would read it."""
    _become(ssh_argv(machine, _write_known_hosts(machine), words=command))


def run_exec(machine: Mapping[str, Any], command: Sequence[str]) -> NoReturn:
    """Become an ssh that runs exactly `command`, without a terminal."""
    # sshd gives the words to a shell, joined by spaces.
    _become(ssh_argv(machine, _write_known_hosts(machine), options=["-T"], words=[shlex.join(command)]))


def ssh_argv(
    machine: Mapping[str, Any], known_hosts: Path, *, options: Sequence[str] = (), words: Sequence[str] = ()
) -> list[str]:
    """The command line; `machine` is as the daemon shows it."""
    settings = [
        f"UserKnownHostsFile={_quoted(known_hosts)}",
        "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
        "UpdateHostKeys=no",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        f"HostKeyAlias={machine['name']}",
        "LogLevel=ERROR",
    ]
    argv = ["ssh", "-F", "none", "-p", str(machine["ssh_port"]), "-i", str(machine["client_key"]), *options]
    return [*argv, *(part for setting in settings for part in ("-o", setting)), "--", f"{ACCOUNT}@127.0.0.1", *words]


def _quoted(path: Path) -> str:
    """ssh_config(5): `%` begins a token, and a path with spaces stands in quotes."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if " " in text else text


def known_hosts_text(name: str, host_keys: Sequence[str]) -> str:
    """The guest's host keys under the machine's name; the comments of the keys are left out."""
    return "".join(f"{name} {' '.join(key.split()[:2])}\n" for key in host_keys)


def _write_known_hosts(machine: Mapping[str, Any]) -> Path:
    """A file that stays: ssh reads it after we have become it."""
    from offloadd.paths import find_paths, make_private

    if not machine.get("client_key") or not machine.get("host_keys") or not machine.get("ssh_port"):
        name = machine["name"]
        raise NotFoundError("is not ready yet", subject=str(name), hint=f"offload vm start {name}")
    path = make_private(find_paths().runtime) / f"known-hosts-{machine['name']}"
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(known_hosts_text(machine["name"], machine["host_keys"]))
    new.replace(path)
    return path


def _become(argv: list[str]) -> NoReturn:
    sys.stdout.flush()
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - a program and its arguments
    except FileNotFoundError as exc:
        raise HostError("ssh is not installed", hint="apt-get install openssh-client") from exc
