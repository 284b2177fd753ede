"""Memory files: sparse copies, seals."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offloadd.vm.memory import copy_memory, open_memory, read_memory, seal_memory

PAGE = mmap.PAGESIZE
MIB = 1 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    made = open_memory("test", 4 * MIB)
    yield made
    os.close(made)


def anew(fd: int, flags: int) -> int:
    """Opened by its name, as QEMU does."""
    return os.open(f"/proc/self/fd/{fd}", flags)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def test_a_new_one_takes_no_memory(fd: int) -> None:
    assert os.fstat(fd).st_size == 4 * MIB
    assert os.fstat(fd).st_blocks == 0
    assert not os.get_inheritable(fd)


def test_its_holes_stay_holes_on_the_disk_and_back(fd: int, tmp_path: Path) -> None:
    os.pwrite(fd, b"first", 0)
    os.pwrite(fd, b"a" * (3 * PAGE), MIB)
    os.pwrite(fd, b"last", 4 * MIB - 4)
    path = tmp_path / "ram"
    copy_memory(fd, path)
    assert path.read_bytes() == content(fd)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 < MIB
    again = read_memory(path)
    assert content(again) == content(fd)
    assert os.fstat(again).st_blocks == os.fstat(fd).st_blocks
    os.close(again)


PIECES = st.lists(st.tuples(st.integers(0, 40 * PAGE), st.binary(min_size=1, max_size=2 * PAGE)), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40 * PAGE), PIECES)
@example(0, [])
@example(1, [(0, b"x")])
@example(40 * PAGE, [])
@example(3 * PAGE + 1, [(3 * PAGE, b"x")])
def test_any_content_is_copied(size: int, pieces: list[tuple[int, bytes]]) -> None:
    fd = open_memory("test", size)
    try:
        for at, piece in pieces:
            os.pwrite(fd, piece[: max(0, size - at)], at)
        with tempfile.TemporaryDirectory() as folder:
            copy_memory(fd, Path(folder, "ram"))
            again = read_memory(Path(folder, "ram"))
            try:
                assert content(again) == content(fd)
                assert os.fstat(again).st_size == size
            finally:
                os.close(again)
    finally:
        os.close(fd)


def test_what_is_there_is_not_written_over(fd: int, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_text("somebody's")
    with pytest.raises(FileExistsError):
        copy_memory(fd, path)
    assert path.read_text() == "somebody's"


def held() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_that_cannot_be_read_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = held()
    with pytest.raises(FileNotFoundError):
        read_memory(tmp_path / "none")
    with pytest.raises(OSError, match=r"Invalid argument|Is a directory"):
        read_memory(tmp_path)
    path = tmp_path / "ram"
    path.write_bytes(bytes(2 * PAGE))
    sendfile = os.sendfile

    def failing(*given: int) -> int:
        sendfile(given[0], given[1], given[2], 1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("offloadd.vm.memory.os.sendfile", failing)
    with pytest.raises(OSError, match="No space left"):
        read_memory(path)
    with pytest.raises(OSError, match="No space left"):
        copy_memory(os.open(path, os.O_RDONLY), tmp_path / "other")
    assert held() == before + 1


@pytest.mark.parametrize("left", [0, 1, PAGE, 3 * PAGE - 1])
def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"x" * (3 * PAGE))
    sendfile = os.sendfile

    def cutting(target: int, source: int, at: int, size: int) -> int:
        os.truncate(path, left)
        return sendfile(target, source, at, size)

    monkeypatch.setattr("offloadd.vm.memory.os.sendfile", cutting)
    before = held()
    with pytest.raises(OSError, match="it got shorter while it was read"):
        read_memory(path)
    assert held() == before


@pytest.fixture
def sealed(fd: int) -> int:
    os.pwrite(fd, b"saved", 0)
    seal_memory(fd)
    return fd


def test_nobody_writes_to_a_sealed_one(sealed: int) -> None:
    for opened in (sealed, anew(sealed, os.O_RDWR), anew(sealed, os.O_WRONLY)):
        with pytest.raises(PermissionError):
            os.pwrite(opened, b"other", 0)
        for size in (0, 8 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(opened, size)
        # fallocate(2): punching holes is writing.
        with pytest.raises(PermissionError):
            os.posix_fallocate(opened, 4 * MIB, PAGE)
        if opened != sealed:
            os.close(opened)
    assert os.pread(sealed, 5, 0) == b"saved"
    assert os.fstat(sealed).st_size == 4 * MIB


def test_nobody_takes_the_seal_away(sealed: int) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert fcntl.fcntl(sealed, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


def test_a_sealed_one_is_mapped_privately_alone(sealed: int) -> None:
    opened = anew(sealed, os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(opened, 4 * MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    # As QEMU maps it for each clone.
    clones = [mmap.mmap(opened, 4 * MIB, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) for _ in range(2)]
    clones[0][0:5] = b"other"
    assert (clones[0][0:5], clones[1][0:5], os.pread(sealed, 5, 0)) == (b"other", b"saved", b"saved")
    for clone in clones:
        clone.close()
    os.close(opened)


def test_one_that_somebody_still_writes_to_is_not_sealed(fd: int) -> None:
    with mmap.mmap(fd, 4 * MIB) as shared:
        with pytest.raises(OSError, match="busy"):
            seal_memory(fd)
        shared[0] = 1
    seal_memory(fd)
