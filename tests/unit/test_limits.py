"""How many processes a build may have."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.place.limits import ENOUGH, limit_processes


@pytest.fixture
def process() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started.pid
        started.kill()


def system(folder: Path, group: str, threads: int, **limits: str) -> Path:
    """A root whose control groups, by the names of their parts, have these limits."""
    for name, text in {"proc/sys/kernel/threads-max": f"{threads}\n", "proc/self/cgroup": group}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, text in limits.items():
        place = folder / "sys/fs/cgroup" / name.replace("__", "/")
        place.mkdir(parents=True, exist_ok=True)
        (place / "pids.max").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("group", "threads", "limits", "expected"),
    [
        ("0::/\n", 20_000, {}, 5_000),
        ("0::/user/me\n", 20_000, {"user__me": "max\n"}, 5_000),
        ("0::/user/me\n", 20_000, {"user__me": "max\n", "user": "4000\n"}, 2_000),
        ("0::/user/me\n", 20_000, {"user__me": "3000\n", "user": "4000\n", "other": "10\n"}, 1_500),
        ("1:pids:/user/me\n", 20_000, {"user": "4000\n"}, 5_000),
        ("0::/me\n", 20_000, {"me": "1500\n"}, ENOUGH),
        ("0::/me\n", 20_000, {"me": "50\n"}, 50),
        ("0::/../../out\n", 20_000, {}, 5_000),
    ],
)
def test_half_of_what_is_ours(
    tmp_path: Path, process: int, group: str, threads: int, limits: dict[str, str], expected: int
) -> None:
    limit_processes(process, system(tmp_path, group, threads, **limits))
    assert resource.prlimit(process, resource.RLIMIT_NPROC) == (expected, expected)


def test_this_host(process: int) -> None:
    own = resource.getrlimit(resource.RLIMIT_NPROC)
    limit_processes(process)
    assert resource.prlimit(process, resource.RLIMIT_NPROC)[0] > 0
    assert resource.getrlimit(resource.RLIMIT_NPROC) == own


def test_one_that_has_ended_already() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    limit_processes(child)
