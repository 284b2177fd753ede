"""Where the files are: the XDG base directories (freedesktop.org), and what is shipped with offload."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offloadd.directories import SOCKET, base_directory, runtime_directory, state_directory
from offloadd.errors import HostError, NotAllowedError


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Every directory of one user (or of the system daemon)."""

    config: Path
    state: Path
    cache: Path
    runtime: Path

    @property
    def socket(self) -> Path:
        return self.runtime / SOCKET

    @property
    def daemon_log(self) -> Path:
        return self.state / "offloadd.log"

    @property
    def database(self) -> Path:
        return self.state / "offload.sqlite"

    @property
    def accelerator(self) -> Path:
        """Whether KVM works, as it was found in this boot of the host."""
        return self.cache / "accelerator.json"

    @property
    def builds(self) -> Path:
        return self.state / "builds"

    @property
    def instances(self) -> Path:
        """One directory for each QEMU that runs."""
        return self.state / "instances"

    @property
    def logs(self) -> Path:
        """Console logs of instances that have ended."""
        return self.state / "logs"

    @property
    def doors(self) -> Path:
        """A record of each socket for a build daemon that runs as a user of its own."""
        return self.state / "doors"

    @property
    def secrets(self) -> Path:
        return self.state / "secrets"

    @property
    def library(self) -> list[Path]:
        """The folders that hold machines/ and images/, least important first."""
        return [shipped(), self.config]


def shipped() -> Path:
    """The folder with the machines/ and images/ of this installation."""
    package = Path(__file__).parent
    installed = package / "share"
    return installed if installed.is_dir() else package.parent


def find_paths() -> Paths:
    """The directories of this user; nothing is created.

    Raises:
        HostError: this user has no home directory.
    """
    try:
        return Paths(
            config=Path(base_directory("XDG_CONFIG_HOME", ".config")),
            state=Path(state_directory()),
            cache=Path(base_directory("XDG_CACHE_HOME", ".cache")),
            runtime=Path(runtime_directory()),
        )
    except FileNotFoundError as exc:
        hint = "set HOME, or all of XDG_CONFIG_HOME, XDG_STATE_HOME and XDG_CACHE_HOME, to directories of yours"
        raise HostError(str(exc.strerror), subject=str(exc.filename), hint=hint) from exc


def check_ours(directory: Path) -> None:
    """Raise `NotAllowedError` when `directory` belongs to another user than us or root: whoever serves there is not trusted."""
    with suppress(FileNotFoundError):
        if directory.lstat().st_uid not in (0, os.geteuid()):
            hint = "is XDG_RUNTIME_DIR another user's?"
            raise NotAllowedError("belongs to another user", subject=str(directory), hint=hint)


def make_private(directory: Path) -> Path:
    """Make `directory` readable by us alone.

    Raises:
        NotAllowedError: it exists and belongs to somebody else.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = directory.lstat()
    if info.st_uid != os.geteuid() or not stat.S_ISDIR(info.st_mode):
        raise NotAllowedError("belongs to another user", subject=str(directory))
    if info.st_mode & 0o077:
        directory.chmod(0o700)
    return directory
