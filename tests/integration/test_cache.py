"""The cache between processes: made once, killed makers, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from offloadd.cache import Cache, remove_tree, scratch
from offloadd.errors import HostError, ImageError

ONE, TWO = "1" * 64, "2" * 64

MAKER = """
import sys, time
from pathlib import Path
import trio
from offloadd.cache import Cache, scratch

async def make(target):
    (scratch(target) / "large").write_text("half")
    (target / "half").write_text("half")
    print("making", flush=True)
    # Until the test closes our standard input.
    await trio.to_thread.run_sync(sys.stdin.read)
    (target / "half").rename(target / "whole")

def progress(phase, fraction):
    print(phase, flush=True)

async def main():
    path = await Cache(Path(sys.argv[1]), subject="image").ensure(sys.argv[2], make, progress)
    print("have", sorted(file.name for file in path.iterdir()), flush=True)

trio.run(main)
"""


def start_maker(root: Path, digest: str = ONE) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", MAKER, str(root), digest]
    repository = str(Path(__file__).parent.parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([repository, *filter(None, sys.path)])}
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def write_whole(target: Path) -> None:
    (target / "whole").write_text("whole")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", subject="image", error=ImageError)


async def test_made_once_then_found(cache: Cache) -> None:
    assert cache.find(ONE) is None
    assert cache.list() == []
    path = await cache.ensure(ONE, write_whole)
    assert path == cache.find(ONE) == cache.root / ONE

    async def never(target: Path) -> None:
        raise AssertionError("made twice")

    assert await cache.ensure(ONE, never) == path
    assert [entry.digest for entry in cache.list()] == [ONE]
    assert await cache.remove(ONE)
    assert not await cache.remove(ONE)
    assert cache.find(ONE) is None


async def test_again_replaces(cache: Cache) -> None:
    await cache.ensure(ONE, write_whole)

    async def other(target: Path) -> None:
        (target / "other").touch()

    path = await cache.ensure(ONE, other, again=True)
    assert [file.name for file in path.iterdir()] == ["other"]
    assert list((cache.root / ".making").iterdir()) == []


async def test_what_somebody_only_used_is_made_again_all_the_same(cache: Cache) -> None:
    """Who waits for him has not waited for another maker: what he used may be damaged."""
    before = (await cache.ensure(ONE, write_whole)).stat().st_ino
    makers = 0

    async def make(target: Path) -> None:
        nonlocal makers
        makers += 1
        (target / "other").touch()

    async with trio.open_nursery() as nursery:
        with cache.hold(ONE):
            for _ in range(2):
                nursery.start_soon(partial(cache.ensure, ONE, make, again=True))
            await trio.sleep(0.6)
            assert makers == 0
    path = cache.find(ONE)
    assert path is not None
    assert (makers, [file.name for file in path.iterdir()]) == (1, ["other"])
    assert path.stat().st_ino != before


async def test_a_failed_make_leaves_nothing(cache: Cache) -> None:
    async def fail(target: Path) -> None:
        (scratch(target) / "large").touch()
        raise ImageError("no", subject="x")

    with pytest.raises(ImageError, match="x: no"):
        await cache.ensure(ONE, fail)
    assert cache.find(ONE) is None
    assert list((cache.root / ".making").iterdir()) == []


async def test_a_cancelled_make_leaves_nothing(cache: Cache) -> None:
    with trio.CancelScope() as scope:

        async def cancelled(target: Path) -> None:
            (target / "half").touch()
            scope.cancel()
            await trio.sleep_forever()

        await cache.ensure(ONE, cancelled)
    assert scope.cancelled_caught
    assert cache.find(ONE) is None
    assert list((cache.root / ".making").iterdir()) == []


async def test_gc_keeps_what_it_is_told(cache: Cache) -> None:
    await cache.ensure(ONE, write_whole)
    await cache.ensure(TWO, write_whole)
    assert await cache.gc({TWO}) == [ONE]
    assert [entry.digest for entry in cache.list()] == [TWO]


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    first = start_maker(tmp_path)
    assert read_line(first) == "making"
    second = start_maker(tmp_path)
    assert read_line(second) == f"waiting for process {first.pid}, which makes the same image"
    assert not (tmp_path / ONE).exists()
    assert first.stdin is not None
    first.stdin.close()
    assert read_line(first) == "have ['whole']"
    out, _ = second.communicate(timeout=10)
    assert out.splitlines()[-1] == "have ['whole']"
    assert "making" not in out.splitlines()
    assert first.wait(10) == second.returncode == 0


def test_what_a_killed_maker_left_is_swept_by_the_next(tmp_path: Path) -> None:
    killed = start_maker(tmp_path)
    other = start_maker(tmp_path, TWO)
    assert read_line(killed) == read_line(other) == "making"
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert not (tmp_path / ONE).exists()
    assert len(list((tmp_path / ".making").iterdir())) == 2
    out, _ = (maker := start_maker(tmp_path)).communicate("", timeout=10)
    assert maker.returncode == 0
    assert out.splitlines() == ["making", "have ['whole']"]
    # The one that is at work was left alone.
    assert [path.name.split(".")[0] for path in (tmp_path / ".making").iterdir()] == [TWO]
    out, _ = other.communicate("", timeout=10)
    assert out.splitlines() == ["have ['whole']"]
    assert list((tmp_path / ".making").iterdir()) == []


async def test_others_files_are_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(HostError, match="somebody else"):
        await remove_tree(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_full_disk(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", subject="image", error=ImageError)

    async def fill(target: Path) -> None:
        (target / "large").write_bytes(bytes(2 * 1024 * 1024))

    with pytest.raises(ImageError, match=f"image: the disk is full at {cache.root}"):
        await cache.ensure(ONE, fill)
    assert cache.find(ONE) is None
    assert list((cache.root / ".making").iterdir()) == []
    await cache.ensure(ONE, write_whole)
