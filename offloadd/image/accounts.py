"""The text files of a Debian system in which a guest of ours needs a line more: pure, each the same when done again.

Sources: passwd(5), group(5), shadow(5), gshadow(5), inittab(5).
"""

from __future__ import annotations

import re

ACCOUNT, UID, HOME, SHELL = "offloading", 900, "/var/lib/offloading", "/bin/sh"

_LOCKED = "*"
"""Admits no password, but sshd does not call the account locked, as it does with `!`."""
_RUNLEVEL = re.compile(r"^[^#:]{1,4}:[2-5]*:wait:/etc/init\.d/rc [2-5]\s*$", re.MULTILINE)
INITTAB_LINE = "ofld:2345:wait:/usr/lib/offload/secret-service --timeout 60 --reboot /sbin/reboot"
_ACCEPT = re.compile(r"\s*AcceptEnv\b", re.IGNORECASE)
_INCLUDE = "Include /etc/ssh/sshd_config.d/*.conf"


def with_account(passwd: str) -> str:
    """`passwd` with the account `offloading`; ValueError: its number is somebody else's."""
    return _with_line(passwd, f"{ACCOUNT}:x:{UID}:{UID}::{HOME}:{SHELL}", number=2)


def with_group(group: str) -> str:
    """`group` with the account's; ValueError: its number is somebody else's."""
    return _with_line(group, f"{ACCOUNT}:x:{UID}:", number=2)


def with_shadow(shadow: str) -> str:
    """`shadow` with the account, and without a password of root's."""
    lines = []
    for line in _lines(shadow):
        name, colon, rest = line.partition(":")
        lines.append(f"root:{_LOCKED}:{rest.partition(':')[2]}" if name == "root" and colon else line)
    return _with_line(_text(lines), f"{ACCOUNT}:{_LOCKED}:18262:0:99999:7:::")


def with_gshadow(gshadow: str) -> str:
    return _with_line(gshadow, f"{ACCOUNT}:!::")


def with_secret_service(inittab: str) -> str:
    """`inittab` with the secret service in front of the runlevels' services, so that sshd starts after it has ended.

    Raises:
        ValueError: init starts no runlevel's services here.
    """
    lines = [line for line in _lines(inittab) if not line.startswith("ofld:")]
    first = next((at for at, line in enumerate(lines) if _RUNLEVEL.match(line)), None)
    if first is None:
        raise ValueError("/etc/inittab starts no services with /etc/init.d/rc")
    return _text([*lines[:first], INITTAB_LINE, *lines[first:]])


def with_include(sshd_config: str) -> str:
    """`sshd_config` that reads our part, and takes no environment from clients.

    sshd takes the first value of a setting, so ours come first; but AcceptEnv adds up.
    """
    lines = [f"#{line}" if _ACCEPT.match(line) else line for line in _lines(sshd_config)]
    active = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return _text(lines if active and active[0] == _INCLUDE.split() else [_INCLUDE, *lines])


def _with_line(text: str, wanted: str, *, number: int | None = None) -> str:
    """`text` whose line with the first field of `wanted` is `wanted`; its place is kept.

    Args:
        number: the field that nobody else may have the same of.
    """
    fields = wanted.split(":")
    lines = _lines(text)
    for line in lines:
        other = line.split(":")
        if number is not None and other[0] != fields[0] and other[number : number + 1] == [fields[number]]:
            raise ValueError(f"{other[0]!r} has the number {fields[number]} already, which is that of {fields[0]}")
    if any(line.split(":")[0] == fields[0] for line in lines):
        return _text([wanted if line.split(":")[0] == fields[0] else line for line in lines])
    # Lines from `+` on are NIS's, which hides what comes after them.
    end = next((at for at, line in enumerate(lines) if line.startswith("+")), len(lines))
    return _text([*lines[:end], wanted, *lines[end:]])


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
