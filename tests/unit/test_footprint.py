"""What memory a guest has for itself."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from offloadd.vm.footprint import parse_rollup, private_memory

# A clone beside no other: the kernel calls what it has of its template private, too.
CLONE = """560aa8b7d000-7ffea488c000 ---p 00000000 00:00 0                          [rollup]
Rss:              166900 kB
Pss:              150890 kB
Private_Clean:        80 kB
Private_Dirty:    143948 kB
Anonymous:        105880 kB
AnonHugePages:     51200 kB
Swap:                 64 kB
SwapPss:              20 kB
"""


def test_what_a_clone_shares_with_its_template_is_not_counted() -> None:
    assert parse_rollup(CLONE) == (105880 + 20) * 1024


def test_a_process_that_is_gone_or_not_ours(tmp_path: Path) -> None:
    assert private_memory(1, tmp_path) is None
    (tmp_path / "1").mkdir()
    (tmp_path / "1/smaps_rollup").write_text("")
    assert private_memory(1, tmp_path) is None
    with pytest.raises(ValueError, match="Anonymous"):
        parse_rollup("Rss: 1 kB\n")


def test_of_this_process() -> None:
    before = private_memory(os.getpid())
    assert before
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[:] = b"x" * len(area)
        after = private_memory(os.getpid())
    assert after is not None
    assert after - before > 24 << 20
