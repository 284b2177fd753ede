"""The images that we write, as QEMU's own tools see them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offloadd.vm.overlay import CLUSTER_BITS, MAX_SIZE, write_overlay

SECTOR = 512
CLUSTER = 1 << CLUSTER_BITS
TABLE = CLUSTER * CLUSTER // 8
"""What one table of the second level reaches."""


def tool(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True, timeout=60).stdout


def about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tool("qemu-img", "info", "--output=json", path))
    return found


def check(path: Path) -> dict[str, Any]:
    """qemu-img ends with a status that is not 0 for whatever it finds."""
    found: dict[str, Any] = json.loads(tool("qemu-img", "check", "--output=json", path))
    return found


@settings(max_examples=25, deadline=None)
@example(SECTOR)
@example(CLUSTER - SECTOR)
@example(CLUSTER + SECTOR)
@example(TABLE - SECTOR)
@example(TABLE)
@example(TABLE + SECTOR)
@example(MAX_SIZE)
@given(st.integers(1, MAX_SIZE // SECTOR).map(lambda sectors: sectors * SECTOR))
def test_qemu_finds_nothing_wrong(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.qcow2")
        write_overlay(path, size)
        seen = about(path)
        assert (seen["format"], seen["virtual-size"], seen["cluster-size"]) == ("qcow2", size, CLUSTER)
        assert (seen["format-specific"]["data"]["compat"], seen["format-specific"]["data"]["corrupt"]) == ("1.1", False)
        assert "backing-filename" not in seen
        checked = check(path)
        assert (checked.get("leaks", 0), checked.get("corruptions", 0), checked["check-errors"]) == (0, 0, 0)
        assert path.stat().st_size == 4 * CLUSTER
        assert path.stat().st_blocks * 512 < CLUSTER


@given(st.integers(-MAX_SIZE, 2 * MAX_SIZE).filter(lambda size: size % SECTOR or not 0 < size <= MAX_SIZE))
@example(0)
@example(-SECTOR)
@example(SECTOR - 1)
@example(MAX_SIZE + SECTOR)
def test_a_size_that_no_disk_has(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.qcow2")
        with pytest.raises(ValueError, match=f"no disk has {size} bytes"):
            write_overlay(path, size)
        assert not path.exists()


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        write_overlay(path, CLUSTER)
    assert path.read_bytes() == b"somebody's"


def io(image: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    return tool("qemu-io", "--image-opts", *words, image)


WRITES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300), st.integers(1, 254)), min_size=1, max_size=6)
"""Sector, sectors, byte; the disk has 4 clusters and a bit."""
SECTORS = 4 * CLUSTER // SECTOR + 3


@settings(max_examples=10, deadline=None)
@given(WRITES)
@example([(SECTORS - 1, 1, 7), (0, SECTORS, 9), (127, 2, 3)])
def test_what_is_written_is_read_again_and_the_rest_is_the_base(writes: list[tuple[int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, path = Path(folder, "base"), Path(folder, "disk.qcow2")
        expected = bytearray(b"\xff" * (SECTORS * SECTOR))
        base.write_bytes(expected)
        write_overlay(path, len(expected))
        commands = []
        for at, count, byte in writes:
            first, last = min(at, SECTORS - 1), min(at + count, SECTORS)
            commands.append(f"write -P {byte} {first * SECTOR} {(last - first) * SECTOR}")
            expected[first * SECTOR : last * SECTOR] = bytes([byte]) * ((last - first) * SECTOR)
        # As qemu_argv names them.
        image = f"driver=qcow2,file.driver=file,file.filename={path},backing.driver=raw,backing.read-only=on"
        image += f",backing.file.driver=file,backing.file.filename={base}"
        io(image, *commands)
        check(path)
        tool("qemu-img", "convert", "--image-opts", "-O", "raw", image, f"{folder}/whole")
        assert Path(folder, "whole").read_bytes() == expected
        assert set(base.read_bytes()) == {0xFF}


def test_all_of_a_disk_of_many_tables_can_be_written(tmp_path: Path) -> None:
    """Refcounts beyond the one block that we make, tables at the far end."""
    path = tmp_path / "disk.qcow2"
    size = 40 * TABLE + SECTOR
    write_overlay(path, size)
    places = [0, TABLE - CLUSTER, 7 * TABLE, 40 * TABLE - CLUSTER]
    pieces = [f"-P {number + 1} {at} {CLUSTER}" for number, at in enumerate(places)] + [f"-P 9 {size - SECTOR} {SECTOR}"]
    image = f"driver=qcow2,file.driver=file,file.filename={path}"
    io(image, *(f"write {piece}" for piece in pieces))
    check(path)
    said = io(image, *(f"read {piece}" for piece in pieces))
    assert "Pattern verification failed" not in said
    assert said.count("read ") == 5
