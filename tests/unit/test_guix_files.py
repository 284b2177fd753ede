"""Files in a directory that another user may change under us."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from offloadd.errors import NotAllowedError, NotFoundError
from offloadd.guix import files
from offloadd.guix.files import Owner

USER = 64_123
"""Nobody of this host's has this number."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory somebody else's")


def lock(folder: Path) -> None:
    with files.locked(folder):
        pass


CHANGES: list[Callable[[Path], object]] = [
    lambda path: files.make_directory(path.parent / "new/inner", None),
    lambda path: files.publish_new(path.parent / "new", b"new", 0o600, Owner(USER, USER)),
    lambda path: files.replace(path, b"new", 0o600, Owner(USER, USER)),
    files.remove,
    lambda path: files.remove_directory(path.parent / "empty"),
    lambda path: files.read_small(path, 100),
    lambda path: lock(path.parent),
    files.refuse_link,
]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What they would like to have changed."""
    made = tmp_path / "target"
    (made / "empty").mkdir(parents=True)
    (made / "file").write_text("root's")
    return made


def tree(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    infos = {path: (path.lstat(), path.read_bytes() if path.is_file() else b"") for path in [folder, *folder.rglob("*")]}
    return {path: (info.st_mode, info.st_uid, content) for path, (info, content) in infos.items()}


@as_root
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("holder", "link"), [(USER, USER), (USER, 0), (0, USER)])
def test_links_of_others_are_no_way(
    tmp_path: Path, target: Path, change: Callable[[Path], object], holder: int, link: int
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "link").symlink_to(target)
    os.chown(theirs, holder, holder)
    os.chown(theirs / "link", link, link, follow_symlinks=False)
    before = tree(target)
    with pytest.raises(NotAllowedError, match="`link` is a symbolic link of another user"):
        change(theirs / "link/file")
    assert tree(target) == before


@as_root
def test_a_link_of_ours_where_all_can_write_is_none_of_ours(tmp_path: Path, target: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    tmp_path.chmod(0o777)
    with pytest.raises(NotAllowedError):
        files.read_small(tmp_path / "link/file", 100)
    tmp_path.chmod(0o1777)
    assert files.read_small(tmp_path / "link/file", 100) == b"root's"


@pytest.mark.parametrize("change", CHANGES)
def test_links_of_ours_are(tmp_path: Path, target: Path, change: Callable[[Path], object]) -> None:
    (tmp_path / "link").symlink_to(target)
    change(tmp_path / "link/file")


@as_root
def test_a_file_that_is_a_link_of_theirs_is_not_read(tmp_path: Path, target: Path) -> None:
    os.chown(tmp_path, USER, USER)
    (tmp_path / "acl").symlink_to(target / "file")
    for reading in (files.read_small, files.read_whole):
        with pytest.raises(NotAllowedError):
            reading(tmp_path / "acl", 100)
    with pytest.raises(NotAllowedError):
        files.replace(tmp_path / "acl", b"", 0o600, None)
    assert files.publish_new(tmp_path / "acl", b"", 0o600, None) is False
    assert (target / "file").read_text() == "root's"


@as_root
def test_what_is_put_in_the_place_of_a_directory_meanwhile_is_left(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait until we are in it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    fsync = os.fsync

    def swap(descriptor: int) -> None:
        fsync(descriptor)
        folder.rename(tmp_path / "away")
        folder.symlink_to(target)

    monkeypatch.setattr(os, "fsync", swap)
    before = tree(target)
    files.publish_new(folder / "key", b"secret", 0o600, Owner(USER, USER))
    assert tree(target) == before
    assert (tmp_path / "away/key").read_bytes() == b"secret"
    assert [path.name for path in (tmp_path / "away").iterdir()] == ["key"]


def test_relative_paths_and_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o077)
    try:
        files.make_directory(Path("a/b"), None)
        files.make_directory(Path("a/b"), None)
        assert files.publish_new(Path("a/b/c"), b"1", 0o644, None)
    finally:
        os.umask(umask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (Path("a"), Path("a/b"), Path("a/b/c"))] == [0o755, 0o755, 0o644]
    files.replace(Path("a/b/c"), b"2", 0o600, None)
    assert files.read_small(Path("a/b/../b/c"), 9) == b"2"
    files.remove(Path("a/b/c"))
    files.remove(Path("a/b/c"))
    files.remove(Path("none/c"))
    with pytest.raises(NotFoundError):
        files.read_small(Path("a/b/c"), 9)
