"""The program that a build daemon starts in the place of its own: our hook; its own where ours cannot run.

guix-daemon starts it not only to send builds away, but also to authenticate and to substitute: nothing works without it.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.setup.steps import MADE_BY

# Before PATH, which may name a profile of root's that a build daemon's user cannot look into.
_PLACES = (
    *("/run/current-system/profile/bin", "/run/current-system/sw/bin", "/usr/local/bin", "/usr/bin"),
    *("/var/guix/profiles/per-user/root/current-guix/bin", "/nix/var/nix/profiles/default/bin"),
)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of ours, and what it needs: whoever runs it may have no way to them."""

    argv: Sequence[str]
    executables: Sequence[str]
    sources: Sequence[str] = ()


def hook_program(hook: str, python: str, entry: Path, package: Path) -> Program:
    """A hook of ours as each build waits for it: what is installed beside Python is not even looked for.

    Args:
        hook: `guix-hook` or `nix-hook`.
        python: runs it.
        entry: the module that it begins with.
        package: the directory of `offloadd`.
    """
    # Not by PYTHONPATH, which the real program would inherit; and what lies where a build daemon works is no module.
    roots = [str(package.parent), str(entry.parents[1])]
    code = f"import sys; sys.path[:0] = {roots!r}; from offload_cli.entry import be_hook; be_hook({hook!r}, sys.argv[1:])"
    sources = [str(entry), str(package / "hook/relay.py")]
    return Program(argv=[python, "-I", "-S", "-c", code], executables=[python], sources=sources)


def wrapper(program: Program, environment: Mapping[str, str], instead: Sequence[str]) -> bytes:
    """A program that runs ours, with its own arguments and these variables; `instead` where it cannot be run.

    The real program inherits the variables: nothing may be in them that it understands.
    """
    checks = [f"[ -x {shlex.quote(path)} ]" for path in program.executables]
    checks += [f"[ -r {shlex.quote(path)} ]" for path in program.sources]
    lines = ["#!/bin/sh", f"# {MADE_BY}", f'{" && ".join(checks)} || exec {shlex.join(instead)} "$@"']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines, f'exec {shlex.join(program.argv)} "$@"', ""]).encode("utf-8", "surrogateescape")


def real_program(name: str, hook: Path) -> str:
    """Where it is; its name, to be looked up when it is run, where this host has none yet.

    Args:
        hook: what stands for it, and is not meant.
    """
    for folder in [*_PLACES, *os.environ.get("PATH", os.defpath).split(os.pathsep)]:
        found = shutil.which(name, path=folder) if folder.startswith("/") else None
        if found and not (hook.exists() and hook.samefile(found)):
            return found
    return name
