"""The socket of a door: where one user can reach it and nobody else, and nobody but us can put another one in its place."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from offloadd.errors import HostError, NotAllowedError
from offloadd.model.door import Door

BACKLOG = 64


class DoorSocket:
    """A socket that listens, and its file.

    Raises:
        NotAllowedError: another user can change what is on the way, or the door's own user cannot reach it.
        HostError: it cannot be made.
    """

    def __init__(self, door: Door) -> None:
        self._path = door.socket
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            _make_directory(Path(door.directory), door.gid)
            self._path.unlink(missing_ok=True)  # a killed daemon's
            self.listener.bind(str(self._path))
            self._file = self._path.stat().st_ino
            os.chown(self._path, -1, door.gid)
            self._path.chmod(0o660)
            self.listener.listen(BACKLOG)
        except OSError as exc:
            self.listener.close()
            raise HostError(f"cannot listen: {exc.strerror or exc}", subject=str(self._path)) from exc
        except NotAllowedError:
            self.listener.close()
            raise

    def close(self) -> None:
        """Listen no more, and take the file and its directory away."""
        self.listener.close()
        with suppress(OSError):  # it is gone, or another daemon of ours has come
            if self._path.stat().st_ino == self._file:
                self._path.unlink()
                self._path.parent.rmdir()


def _make_directory(directory: Path, gid: int) -> None:
    """Make it with mode 0710, and those above it where they are missing: /run is empty after each boot."""
    for parent in reversed(directory.parents):
        with suppress(FileExistsError):
            parent.mkdir(0o700)
            parent.chmod(0o711)
        _check_way(parent)
    with suppress(FileExistsError):
        directory.mkdir(0o700)
    info = directory.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise NotAllowedError("is not ours", subject=str(directory))
    os.chown(directory, -1, gid)
    directory.chmod(0o710)


def _check_way(parent: Path) -> None:
    info = parent.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise NotAllowedError("is no directory", subject=str(parent))
    # In a directory with the sticky bit nobody takes away what is another user's.
    changeable = info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX
    if info.st_uid not in (0, os.geteuid()) or changeable:
        raise NotAllowedError("can be changed by other users, who could serve there in our place", subject=str(parent))
    if not info.st_mode & 0o001:
        raise NotAllowedError("can be entered by its owner alone", subject=str(parent), hint="another --socket-directory")
