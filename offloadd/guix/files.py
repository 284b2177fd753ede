"""Where Guix keeps its configuration, whose it is, and how files are written there: whole or not at all, mode and owner right.

The directory may be another user's than ours (an unprivileged guix-daemon has its own): nothing is written through what lies
there already.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from offloadd.errors import ConfigError, HostError, NotAllowedError, NotFoundError, Problem

STORE = Path("/gnu/store")


class Owner(NamedTuple):
    uid: int
    gid: int


def configuration_directory() -> Path:
    """Where guix-daemon of this host looks for keys, ACL and machines.scm (guix/config.scm)."""
    return Path(os.environ.get("GUIX_CONFIGURATION_DIRECTORY") or "/etc/guix")


def store_owner(store: Path = STORE) -> Owner | None:
    """The user that guix-daemon runs as, who must read the private key; None where there is no store."""
    return _owner_of(store)


def owner_for(directory: Path) -> Owner | None:
    """Whose new files in `directory` are: guix-daemon's where it looks for them, elsewhere the directory's; None: ours."""
    if directory == configuration_directory():
        return store_owner()
    return _owner_of(directory)


def make_directory(directory: Path, owner: Owner | None) -> None:
    """Make it with the mode that distributions give it, 0755; one that is there stays as it is.

    Guix itself, started as root without it, makes it with mode 0511, by a umask that is meant for the private key.
    """
    with files_of(directory):
        if directory.is_dir():
            return
        if not directory.parent.is_dir():
            # With the same mode, whatever our umask: another user is to come in.
            make_directory(directory.parent, None)
        try:
            directory.mkdir()
        except FileExistsError:
            # Made by another command at the same time, or a file; then opening it says so.
            return
        directory.chmod(0o755)
        _give(directory, owner)


def publish_new(path: Path, content: bytes, mode: int, owner: Owner | None) -> bool:
    """Write a file that is not there, whole or not at all; False, and nothing done, when it is there, whatever it is."""
    with files_of(path), _written(path, content, mode, owner) as new:
        try:
            # Unlike a rename, this fails where something is in the way.
            path.hardlink_to(new)
        except FileExistsError:
            return False
        return True


def replace(path: Path, content: bytes, mode: int, owner: Owner | None) -> None:
    """Write a file in the place of what is there: a reader finds the old one or the new one.  Mode and owner of that one stay.

    Raises:
        NotAllowedError: it is a symbolic link.
    """
    with files_of(path):
        with suppress(FileNotFoundError):
            info = path.lstat()
            refuse_link(path)
            mode, owner = info.st_mode & 0o7777, Owner(info.st_uid, info.st_gid)
        with _written(path, content, mode, owner) as new:
            new.replace(path)


def refuse_link(path: Path) -> None:
    """Raise NotAllowedError when it is a symbolic link: Guix System and NixOS make their configuration so."""
    if path.is_symlink():
        hint = "where the system is declared, say it there: Guix System has `authorized-keys` and `build-machines`"
        raise NotAllowedError("is a symbolic link: what it points to is not ours", subject=str(path), hint=hint)


def remove(path: Path) -> None:
    """Take a file away; nothing is done when it is not there."""
    with files_of(path):
        path.unlink(missing_ok=True)


def read_small(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes; a larger one is cut one byte after it, so that whoever parses it sees that.

    Raises:
        NotFoundError: there is none.
        NotAllowedError, HostError: it cannot be read.
    """
    with files_of(path), path.open("rb") as file:
        return file.read(limit + 1)


def read_whole(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes, which is to be written again, or kept.

    Raises:
        HostError: it is larger, or cannot be read.
        NotFoundError, NotAllowedError: as `read_small`.
    """
    content = read_small(path, limit)
    if len(content) > limit:
        raise HostError(f"is larger than {limit} bytes", subject=str(path))
    return content


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait until no other command of ours changes what is in `directory`; Guix itself takes no lock."""
    with files_of(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def wrong(path: Path, field: str, message: str) -> ConfigError:
    """The error for a file whose text can be read and does not say what it should."""
    return ConfigError([Problem(file=str(path), line=0, field=field, message=message)])


@contextmanager
def files_of(path: Path) -> Iterator[None]:
    """Errors of the operating system become ours.

    Raises:
        NotFoundError: `path` is not there.
        NotAllowedError: we may not do this.
        HostError: anything else.
    """
    try:
        yield
    except FileNotFoundError as exc:
        raise NotFoundError("there is no such file", subject=str(path)) from exc
    except PermissionError as exc:
        hint = "what guix-daemon reads is written by root: use sudo, or another --directory"
        raise NotAllowedError("permission denied", subject=str(path), hint=hint) from exc
    except OSError as exc:
        raise HostError(f"{exc.strerror}", subject=str(path)) from exc


@contextmanager
def _written(path: Path, content: bytes, mode: int, owner: Owner | None) -> Iterator[Path]:
    """A complete new file beside `path`, under a name of its own, which is gone afterwards."""
    # Nobody else can read it until it has its mode.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            _give(descriptor, owner)
            # After that: changing the owner takes setuid away.
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _owner_of(path: Path) -> Owner | None:
    with suppress(OSError):
        info = path.stat()
        return Owner(info.st_uid, info.st_gid)
    return None


def _give(file: Path | int, owner: Owner | None) -> None:
    # Who is not root may not choose a group freely; and need not, where the user is right.
    if owner is not None and (os.geteuid() == 0 or owner.uid != os.geteuid()):
        os.chown(file, *owner)
