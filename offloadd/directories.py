"""Where our directories are, as text: build hooks find the daemon with it, and loading pathlib takes longer than their work."""

from __future__ import annotations

import errno
import os

SOCKET = "offloadd.sock"


def base_directory(variable: str, default: str) -> str:
    """Ours in one of the XDG base directories (freedesktop.org), whose default is below the home directory.

    Raises:
        FileNotFoundError: this user has no home directory.
    """
    value = os.environ.get(variable, "")
    # The specification has relative paths ignored.
    return f"{value if value.startswith('/') else f'{_home()}/{default}'}/offload"


def state_directory() -> str:
    """What is kept."""
    return base_directory("XDG_STATE_HOME", ".local/state")


def runtime_directory() -> str:
    """Where the daemon's socket is."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/offload" if runtime.startswith("/") else f"{state_directory()}/run"


def _home() -> str:
    home = os.path.expanduser("~")
    if home == "~":
        raise FileNotFoundError(errno.ENOENT, "has no home directory", f"user {os.getuid()}")
    return home
