"""Nix on this host asks us before each build: its setting `build-hook` is ours.

    /etc/nix/nix.conf           one line more: the file of ours is included
    /etc/nix/offload/nix.conf   build-hook = /etc/nix/offload/hook
    /etc/nix/offload/hook       runs `offload nix-hook`

Nix's list of machines stays as it is: the hook asks Nix's own one when none of ours takes a build.  Keys need no copies, as
nix-daemon is root's, and no signatures: machines trust the account that we log in to.
"""

from __future__ import annotations

import os
from pathlib import Path

from offloadd.errors import UsageError
from offloadd.setup.steps import MADE_BY, Step, file_step, read_text


def nix_directory() -> Path:
    """Where Nix of this host looks for nix.conf (Nix Reference Manual: "nix.conf")."""
    return Path(os.environ.get("NIX_CONF_DIR") or "/etc/nix")


def nix_steps(directory: Path, hook: bytes) -> list[Step]:
    """All that is to be done, in this order.

    Args:
        hook: the program for `build-hook`.
    Raises:
        UsageError: Nix has no way to write the directory's name.
    """
    program, ours, theirs = directory / "offload/hook", directory / "offload/nix.conf", directory / "nix.conf"
    if not str(directory).isprintable() or any(character in str(directory) for character in " #"):
        raise UsageError("Nix takes no hook whose name has blanks in it", subject=str(directory))
    return [
        file_step(program, lambda: hook, 0o755),
        file_step(ours, f"# {MADE_BY}\nbuild-hook = {program}\n".encode),
        file_step(theirs, lambda: _included(read_text(theirs), ours).encode("utf-8", "surrogateescape")),
    ]


def _included(text: str | None, ours: Path) -> str:
    # With a `!` Nix does not mind that the file is away.
    line = f"!include {ours}"
    text = text or ""
    if line in (found.strip() for found in text.splitlines()):
        return text
    between = "\n" if text and not text.endswith("\n") else ""
    return f"{text}{between}{line}\n"
