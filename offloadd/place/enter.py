"""A shell of a person in an environment on this host: what a build would find, thrown away afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offloadd.cache import as_mapped_root
from offloadd.model.system import SYSTEMS
from offloadd.paths import make_private, shipped
from offloadd.place.local import build_user, check_sandbox

_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from build_service.shell import main; sys.exit(main(sys.argv[1:]))"
_BUILD_USER = 1000


@contextmanager
def enter_command(
    root: Path,
    state: Path,
    *,
    system: str,
    command: Sequence[str] = (),
    as_root: bool = False,
    network: bool = False,
) -> Iterator[list[str]]:
    """The command line that does it, to be run in the block; its exit status is the command's.

    Args:
        root: of an unpacked environment, which somebody keeps from being removed.
        state: as for builds on this host.
        system: the environment's system type.
        command: by default a shell.
        as_root: be root of the environment, and not the user whom builds run as.
    Raises:
        HostError: bubblewrap is missing, or no user is free.
    """
    check_sandbox()
    with build_user() as user:
        options = {"--environment": str(root), "--state": str(make_private(state)), "--user": str(user or _BUILD_USER)}
        options |= {"--root": "yes"} if as_root else {}
        options |= {"--network": "yes"} if network else {}
        options |= {"--personality": "linux32"} if system in SYSTEMS and SYSTEMS[system].bits == 32 else {}
        options |= {"--term": os.environ.get("TERM") or "dumb"}
        words = [word for pair in options.items() for word in pair]
        argv = [
            sys.executable,
            "-IS",
            "-c",
            _START,
            str(shipped() / "images/guest"),
            *words,
            *(["--", *command] if command else []),
        ]
        yield argv if user is not None else as_mapped_root(argv)
