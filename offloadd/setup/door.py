"""A way to our daemon for a guix-daemon that runs as a user of its own, as Debian's does."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from offloadd.guix.files import Owner
from offloadd.model.door import Door
from offloadd.paths import Paths
from offloadd.setup.guix import copied_key
from offloadd.setup.journal import setup_name
from offloadd.setup.steps import Step, file_step

DOORS = Path("/run/offload-build-daemons")
"""Not below the runtime directory, which is for our user alone."""


def needs_door(owner: Owner | None) -> bool:
    """Whether guix-daemon's user cannot use our own socket, and may be given another: that only root's daemon can do."""
    return owner is not None and owner.uid != 0 and os.geteuid() == 0


def guix_door(configuration: Path, owner: Owner, directory: Path) -> Door:
    """The door for that user.

    Args:
        configuration: Guix's configuration directory.
        directory: where the socket gets a directory of its own.
    """
    own = directory / setup_name("guix", configuration)
    keys = copied_key(configuration, "MACHINE").parent
    return Door(daemon="guix", directory=str(own), uid=owner.uid, gid=owner.gid, keys=str(keys))


def door_record(paths: Paths, configuration: Path) -> Path:
    """Where our daemon looks for the door of this configuration."""
    return paths.doors / f"{setup_name('guix', configuration)}.json"


def guix_socket(paths: Paths, configuration: Path) -> Path:
    """Where guix-daemon with this configuration reaches our daemon: at its door, when it has one."""
    with suppress(FileNotFoundError):
        return Door.model_validate_json(door_record(paths, configuration).read_bytes()).socket
    return paths.socket


def door_step(record: Path, door: Door) -> Step:
    """Have our daemon open it, each time that it starts."""
    return file_step(record, lambda: json.dumps(door.to_json(), indent=1).encode() + b"\n", 0o600)
