"""Where Guix keeps its configuration, whose it is, and how files are written there: whole or not at all, mode and owner right.

The directory may be another user's than ours (an unprivileged guix-daemon has its own): nothing is read or written through a
symbolic link that is there, on no part of the way.  Directories are opened one after the other, and what is done in one is done
relative to its descriptor: it does not matter what is put in its place meanwhile.  A link of root's or ours is followed where
nobody else can have put it: whoever did so meant it.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from offloadd.errors import ConfigError, HostError, NotAllowedError, NotFoundError, Problem

STORE = Path("/gnu/store")
_DIRECTORY = os.O_DIRECTORY | os.O_CLOEXEC


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
        with suppress(FileNotFoundError), _opened(directory):
            return
        # With the same mode, whatever our umask: another user is to come in.
        make_directory(directory.parent, None)
        with _beside(directory) as (folder, name):
            try:
                os.mkdir(name, 0o700, dir_fd=folder)
            except FileExistsError:
                # Made by another command at the same time, or a file; then opening it says so.
                return
            new = os.open(name, os.O_RDONLY | _DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            try:
                if os.fstat(new).st_uid != os.geteuid():
                    raise NotAllowedError("has been replaced by another user", subject=str(directory))
                os.fchmod(new, 0o755)
                _give(new, owner)
            finally:
                os.close(new)


def publish_new(path: Path, content: bytes, mode: int, owner: Owner | None) -> bool:
    """Write a file that is not there, whole or not at all; False, and nothing done, when it is there, whatever it is."""
    with files_of(path), _beside(path) as (folder, name), _written(folder, name, content, mode, owner) as new:
        try:
            # Unlike a rename, this fails where something is in the way.
            os.link(new, name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            return False
        return True


def replace(path: Path, content: bytes, mode: int, owner: Owner | None) -> None:
    """Write a file in the place of what is there: a reader finds the old one or the new one.  Mode and owner of that one stay.

    Raises:
        NotAllowedError: it is a symbolic link.
    """
    with files_of(path), _beside(path) as (folder, name):
        with suppress(FileNotFoundError):
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
            _refuse(path, info)
            mode, owner = info.st_mode & 0o7777, Owner(info.st_uid, info.st_gid)
        with _written(folder, name, content, mode, owner) as new:
            os.replace(new, name, src_dir_fd=folder, dst_dir_fd=folder)


def refuse_link(path: Path) -> None:
    """Raise NotAllowedError when it is a symbolic link: Guix System and NixOS make their configuration so."""
    with suppress(NotFoundError), files_of(path), _beside(path) as (folder, name):
        _refuse(path, os.stat(name, dir_fd=folder, follow_symlinks=False))


def remove(path: Path) -> None:
    """Take a file away; nothing is done when it is not there."""
    with suppress(NotFoundError), files_of(path), _beside(path) as (folder, name):
        os.unlink(name, dir_fd=folder)


def remove_directory(directory: Path) -> None:
    """Take an empty directory away.

    Raises:
        NotFoundError, NotAllowedError, HostError: it is not there, or not for us, or not empty.
    """
    with files_of(directory), _beside(directory) as (folder, name):
        os.rmdir(name, dir_fd=folder)


def read_small(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes; a larger one is cut one byte after it, so that whoever parses it sees that.

    Raises:
        NotFoundError: there is none.
        NotAllowedError, HostError: it cannot be read.
    """
    with files_of(path), _beside(path) as (folder, name), os.fdopen(_enter(folder, name, os.O_RDONLY, path), "rb") as file:
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
    with files_of(directory), _opened(directory) as folder:
        descriptor = os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=folder)
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
def _beside(path: Path) -> Iterator[tuple[int, str]]:
    """A descriptor of the directory that `path` is in, for use as `dir_fd`, and its name there."""
    with _opened(path.parent) as folder:
        yield folder, path.name


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """A descriptor of a directory, to which there is no way through somebody else's links."""
    descriptor = os.open("/" if directory.is_absolute() else ".", os.O_PATH | _DIRECTORY)
    try:
        for part in directory.parts[directory.is_absolute() :]:
            inner = _enter(descriptor, part, os.O_PATH | _DIRECTORY, directory)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _enter(folder: int, name: str, flags: int, path: Path) -> int:
    """Open what is in that directory; a link only when nobody can have put it there but root and we."""
    info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    holder = os.fstat(folder)
    changeable = holder.st_mode & 0o022 and not holder.st_mode & stat.S_ISVTX
    if changeable or not {holder.st_uid, info.st_uid} <= {0, os.geteuid()}:
        hint = "who can change its directory may lead us anywhere: put in its place what it points to"
        raise NotAllowedError(f"`{name}` is a symbolic link of another user", subject=str(path), hint=hint)
    return os.open(name, flags, dir_fd=folder)


def _refuse(path: Path, info: os.stat_result) -> None:
    if stat.S_ISLNK(info.st_mode):
        hint = "where the system is declared, say it there: Guix System has `authorized-keys` and `build-machines`"
        raise NotAllowedError("is a symbolic link: what it points to is not ours", subject=str(path), hint=hint)


@contextmanager
def _written(folder: int, name: str, content: bytes, mode: int, owner: Owner | None) -> Iterator[str]:
    """A complete new file in that directory, under a name of its own, which is gone afterwards."""
    new = f".{name}.{os.urandom(8).hex()}"
    # Nobody else can read it until it has its mode.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            _give(descriptor, owner)
            # After that: changing the owner takes setuid away.
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        yield new
    finally:
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=folder)


def _owner_of(path: Path) -> Owner | None:
    with suppress(OSError):
        info = path.stat()
        return Owner(info.st_uid, info.st_gid)
    return None


def _give(file: int, owner: Owner | None) -> None:
    # Who is not root may not choose a group freely; and need not, where the user is right.
    if owner is not None and (os.geteuid() == 0 or owner.uid != os.geteuid()):
        os.fchown(file, *owner)
