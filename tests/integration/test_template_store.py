"""Templates on the disk and in memory: damage is found, nothing is made twice, nobody loses what he uses."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from offloadd.digest import sparse_sha256
from offloadd.errors import HostError, ImageError, NotAllowedError, NotFoundError, UsageError
from offloadd.template.freeze import DISK, MANIFEST, RAM, STATE
from offloadd.template.load import load_template, read_template
from offloadd.template.store import TemplateStore
from offloadd.vm.memory import SavedGuest

ONE, TWO = "1" * 64, "2" * 64
MIB = 1 << 20


def write_template(directory: Path, digest: str, mark: bytes = b"made") -> None:
    """As `freeze` leaves one, with other content."""
    with (directory / RAM).open("wb") as ram:
        ram.truncate(4 * MIB)
        ram.seek(MIB)
        ram.write(mark * 1000)
    (directory / STATE).write_bytes(b"state of " + mark)
    (directory / DISK).write_bytes(mark * 100_000)
    files = {
        name: {"size": (directory / name).stat().st_size, "sparse_sha256": sparse_sha256(directory / name)}
        for name in (RAM, STATE, DISK)
    }
    manifest = {"digest": digest, "machine": "m", "facts": {"cpu": "max"}, "files": files, "made": "2026-01-01T00:00:00Z"}
    (directory / MANIFEST).write_text(json.dumps(manifest))


class Maker:
    """Makes templates, and counts them."""

    def __init__(self, digest: str = ONE) -> None:
        self.count = 0
        self.digest = digest
        self.hold = trio.Event()
        self.hold.set()

    async def __call__(self, directory: Path) -> None:
        self.count += 1
        await self.hold.wait()
        write_template(directory, self.digest, b"%d" % self.count)


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[TemplateStore]:
    """Whatever a test did with it: nothing stays open."""
    before = descriptors()
    made = TemplateStore(tmp_path / "templates")
    yield made
    made.close()
    assert descriptors() == before


def descriptors() -> list[str]:
    """The memory files that are open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except OSError:
            continue
    return sorted(name for name in found if "memfd:" in name)


def content(saved: SavedGuest) -> tuple[bytes, bytes, bytes]:
    ram, state, frozen = (os.pread(fd, 8 * MIB, 0) for fd in (saved.ram, saved.state, saved.frozen))
    return ram, state, frozen


async def test_made_once_then_loaded_once(store: TemplateStore, maker: Maker) -> None:
    assert not store.is_ready(ONE)
    async with store.open(ONE, maker) as first, store.open(ONE, maker) as second:
        assert first is second
        assert first.digest == ONE
        assert content(first)[1] == b"state of 1"
        assert (store.is_ready(ONE), store.is_loaded(ONE)) == (True, True)
    async with store.open(ONE, maker) as third:
        assert third is first
    assert maker.count == 1
    assert len(descriptors()) == 3


async def test_what_is_in_memory_cannot_be_changed(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    async with store.open(ONE, maker) as saved:
        directory = tmp_path / "templates" / ONE
        assert content(saved) == tuple((directory / name).read_bytes() for name in (RAM, STATE, DISK))
        assert os.fstat(saved.ram).st_blocks * 512 < MIB
        for fd in (saved.ram, saved.state, saved.frozen):
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)


async def test_another_process_finds_it(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    async with store.open(ONE, maker) as saved:
        other = TemplateStore(tmp_path / "templates")
        assert (other.is_ready(ONE), other.is_loaded(ONE)) == (True, False)
        async with other.open(ONE, maker) as again:
            assert again is not saved
            assert content(again) == content(saved)
        other.close()
    assert maker.count == 1


async def test_two_at_once_make_one(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    """In one daemon, and in two."""
    other = TemplateStore(tmp_path / "templates")
    seen: list[bytes] = []
    maker.hold = trio.Event()

    async def use(one: TemplateStore) -> None:
        async with one.open(ONE, maker) as saved:
            seen.append(content(saved)[1])

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for one in (store, store, store, other, other):
                nursery.start_soon(use, one)
            while not maker.count:
                await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked(0.05)
            maker.hold.set()
    assert (maker.count, seen) == (1, [b"state of 1"] * 5)
    other.close()


async def test_others_are_not_kept_waiting(store: TemplateStore, maker: Maker) -> None:
    maker.hold = trio.Event()
    async with trio.open_nursery() as nursery:

        async def slow() -> None:
            async with store.open(ONE, maker):
                pass

        nursery.start_soon(slow)
        with trio.fail_after(10):
            async with store.open(TWO, Maker(TWO)) as saved:
                assert saved.digest == TWO
        assert not store.is_ready(ONE)
        maker.hold.set()


async def test_what_cannot_be_made(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    async def fails(directory: Path) -> None:
        (directory / RAM).write_bytes(b"half")
        raise HostError("no QEMU")

    for _ in range(2):
        with pytest.raises(HostError, match="no QEMU"):
            async with store.open(ONE, fails):
                pytest.fail("it was not made")
        assert not store.is_ready(ONE)
        assert not list((tmp_path / "templates/.making").iterdir())
    async with store.open(ONE, maker):
        pass


async def test_a_disk_without_room(store: TemplateStore) -> None:
    async def fails(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ImageError, match="disk"):
        async with store.open(ONE, fails):
            pytest.fail("it was not made")


async def test_whoever_made_it_is_cancelled(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    maker.hold = trio.Event()
    with trio.move_on_after(0.2) as scope:
        async with store.open(ONE, maker):
            pytest.fail("it was not made")
    assert scope.cancelled_caught
    assert not list((tmp_path / "templates/.making").iterdir())
    maker.hold.set()
    async with store.open(ONE, maker):
        pass


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data)))


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return data


DAMAGE: dict[str, Callable[[Path], object]] = {
    "ram cut short": lambda folder: os.truncate(folder / RAM, 2 * MIB),
    "ram empty": lambda folder: os.truncate(folder / RAM, 0),
    "ram longer": lambda folder: os.truncate(folder / RAM, 5 * MIB),
    "ram changed": lambda folder: flip(folder / RAM, MIB + 5),
    "ram changed in a hole": lambda folder: flip(folder / RAM, 3 * MIB),
    "ram gone": lambda folder: (folder / RAM).unlink(),
    "ram a directory": lambda folder: become_folder(folder / RAM),
    "state changed": lambda folder: flip(folder / STATE, 3),
    "state cut short": lambda folder: os.truncate(folder / STATE, 3),
    "state gone": lambda folder: (folder / STATE).unlink(),
    "disk changed at its end": lambda folder: flip(folder / DISK, 99_999),
    "disk gone": lambda folder: (folder / DISK).unlink(),
    "disk another one's": lambda folder: (folder / DISK).write_bytes((folder / STATE).read_bytes()),
    "manifest gone": lambda folder: (folder / MANIFEST).unlink(),
    "manifest empty": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "manifest garbage": lambda folder: (folder / MANIFEST).write_bytes(os.urandom(500)),
    "manifest cut short": lambda folder: os.truncate(folder / MANIFEST, 100),
    "manifest deep": lambda folder: (folder / MANIFEST).write_text("[" * 200_000),
    "manifest a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "manifest another one's": lambda folder: edit(folder / MANIFEST, lambda data: data | {"digest": TWO}),
    "manifest without a digest": lambda folder: edit(folder / MANIFEST, lambda data: without(data, "digest")),
    "manifest without facts": lambda folder: edit(folder / MANIFEST, lambda data: data | {"facts": 7}),
    "manifest without files": lambda folder: edit(folder / MANIFEST, lambda data: data | {"files": None}),
    "manifest without a file": lambda folder: edit(folder / MANIFEST, lambda data: without(data, "files", STATE)),
    "manifest without a size": lambda folder: edit(folder / MANIFEST, lambda data: without(data, "files", RAM, "size")),
    "manifest without a sum": lambda folder: edit(
        folder / MANIFEST, lambda data: without(data, "files", DISK, "sparse_sha256")
    ),
    "manifest with an odd size": lambda folder: edit(
        folder / MANIFEST, lambda data: data | {"files": data["files"] | {RAM: {"size": [], "sparse_sha256": ""}}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damage_is_found_told_and_made_good(damage: str, store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    async with store.open(ONE, maker):
        pass
    store.close()
    DAMAGE[damage](tmp_path / "templates" / ONE)
    told: list[str] = []
    async with store.open(ONE, maker, lambda text, _: told.append(text)) as saved:
        assert content(saved)[1] == b"state of 2"
    assert maker.count == 2
    [line] = [text for text in told if "making it anew" in text]
    assert line.startswith(f"template {ONE[:12]}: ")
    assert damage.split()[0].replace("disk", DISK) in line
    # What is on the disk now is whole.
    store.close()
    async with store.open(ONE, maker, lambda text, _: told.append(text)) as saved:
        assert content(saved)[1] == b"state of 2"
    assert maker.count == 2


async def test_one_that_is_made_damaged_is_told(store: TemplateStore) -> None:
    count = 0

    async def wrong(directory: Path) -> None:
        nonlocal count
        count += 1
        write_template(directory, ONE)
        flip(directory / STATE, 0)

    with pytest.raises(ImageError, match="the content of state is not what was saved"):
        async with store.open(ONE, wrong):
            pytest.fail("it is damaged")
    assert count == 2


async def test_damage_does_not_reach_who_has_it(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    async with store.open(ONE, maker) as saved:
        before = content(saved)
        for name in (RAM, STATE, DISK):
            os.truncate(tmp_path / "templates" / ONE / name, 0)
        assert content(saved) == before
    async with store.open(ONE, maker) as saved:
        assert content(saved) == before
    assert maker.count == 1


async def test_removed_while_it_is_used(store: TemplateStore, maker: Maker) -> None:
    async with store.open(ONE, maker) as saved:
        before = content(saved)
        assert await store.remove(ONE)
        assert not store.is_ready(ONE)
        assert content(saved) == before
        async with store.open(ONE, maker) as newer:
            assert newer is not saved
            assert content(newer)[1] == b"state of 2"
        assert content(saved) == before
        assert len(descriptors()) == 6
    # The old one went with its last user, the new one is kept.
    assert len(descriptors()) == 3
    assert store.is_loaded(ONE)
    assert await store.remove(ONE)
    assert descriptors() == []
    assert not await store.remove(ONE)


async def test_removed_while_somebody_makes_it(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    async with store.open(ONE, maker):
        pass
    store.close()
    os.truncate(tmp_path / "templates" / ONE / RAM, 0)
    maker.hold = trio.Event()
    async with trio.open_nursery() as nursery:

        async def use() -> None:
            async with store.open(ONE, maker) as saved:
                assert content(saved)[1] == b"state of 2"

        nursery.start_soon(use)
        with trio.fail_after(10):
            while maker.count < 2:
                await trio.sleep(0.01)
        with pytest.raises(NotAllowedError, match="is in use"):
            await store.remove(ONE)
        maker.hold.set()


async def test_what_nobody_has_used_for_a_while_is_given_back(
    store: TemplateStore, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(trio, "current_time", lambda: now)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(store.open(ONE, maker))
        async with store.open(TWO, Maker(TWO)):
            pass
        now += 59
        assert store.drop_idle(60) == []
        now += 1
        assert store.drop_idle(60) == [TWO]
        assert (store.is_loaded(TWO), store.is_ready(TWO)) == (False, True)
        # One that is used is never idle.
        now += 10_000
        assert store.drop_idle(60) == []
        assert len(descriptors()) == 3
    # From here on it counts.
    assert store.drop_idle(60) == []
    now += 60
    assert store.drop_idle(60) == [ONE]
    assert descriptors() == []


async def test_the_list_leaves_out_what_is_damaged(store: TemplateStore, maker: Maker, tmp_path: Path) -> None:
    assert store.list() == []
    for digest in (ONE, TWO):
        async with store.open(digest, Maker(digest)):
            pass
    assert {template.digest for template in store.list()} == store.digests() == {ONE, TWO}
    found = store.called("1")
    assert (found.digest, found.machine, found.facts) == (ONE, "m", {"cpu": "max"})
    assert json.loads(json.dumps(found.to_json()))["size_on_disk"] < 2 * MIB
    for name in ("3", "", "11111x"):
        with pytest.raises(NotFoundError):
            store.called(name)
    (tmp_path / "templates" / TWO / MANIFEST).write_text("{")
    assert [template.digest for template in store.list()] == [ONE]
    assert store.digests() == {ONE, TWO}


async def test_a_beginning_of_several(store: TemplateStore) -> None:
    for digest in (ONE, "1" * 63 + "2"):
        async with store.open(digest, Maker(digest)):
            pass
    with pytest.raises(UsageError, match="several") as caught:
        store.called("111")
    assert ONE in caught.value.detail
    assert store.called(ONE).digest == ONE


async def test_gc_keeps_what_it_is_told(store: TemplateStore, tmp_path: Path) -> None:
    for digest in (ONE, TWO):
        async with store.open(digest, Maker(digest)):
            pass
    (tmp_path / f"templates/.making/{ONE}.dead").mkdir()
    assert await store.gc({ONE}) == [TWO]
    assert (store.digests(), store.is_loaded(ONE), store.is_loaded(TWO)) == (frozenset({ONE}), True, False)
    assert not list((tmp_path / "templates/.making").iterdir())


def test_nothing_stays_open_when_the_last_file_is_wrong(tmp_path: Path) -> None:
    directory = tmp_path / ONE
    directory.mkdir()
    write_template(directory, ONE)
    flip(directory / DISK, 0)
    with pytest.raises(ImageError, match=r"content of disk\.qcow2"):
        load_template(read_template(directory))
    assert descriptors() == []
