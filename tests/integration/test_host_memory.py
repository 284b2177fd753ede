"""What the kernel says of the host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.daemon.host_memory import HostMemory, read_host_memory

MEMINFO = "MemTotal:       16315272 kB\nMemFree:          218396 kB\nMemAvailable:    9437184 kB\nHugePages_Total:       0\n"
PRESSURE = "some avg10=12.34 avg60=0.10 avg300=0.02 total=17254\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=9023\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "pressure").mkdir()
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "pressure/memory").write_text(PRESSURE)
    return tmp_path


def test_what_the_kernel_says(proc: Path) -> None:
    assert read_host_memory(proc) == HostMemory(total=16315272 << 10, available=9 << 30, pressure=12.34)


def test_a_kernel_that_does_not_measure_pressure(proc: Path) -> None:
    (proc / "pressure/memory").unlink()
    assert read_host_memory(proc).pressure is None
    # Where it is turned off the file is there, and cannot be read.
    (proc / "pressure/memory").mkdir()
    assert read_host_memory(proc).pressure is None
    assert read_host_memory(proc).available == 9 << 30


def test_a_host_that_says_nothing(tmp_path: Path) -> None:
    assert read_host_memory(tmp_path) == HostMemory(total=0, available=0, pressure=None)


def test_this_host() -> None:
    found = read_host_memory()
    assert 0 < found.available <= found.total
    assert found.pressure is None or 0 <= found.pressure <= 100
