"""What goes by disk, and a guest that lies about its disk."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from offloadd.builder import bulk
from offloadd.builder.bulk import BULK_BYTES, Bulk, Scratch, channel_for, open_bulk
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.source import clamp_tar, measure_source, pack_source
from offloadd.errors import BuildFailedError, HostError, ProtocolError, UsageError
from offloadd.guest.frames import HOST_KINDS, Decoder, encode

from .fake_guest import FakeGuest
from .test_build_service_parts import load
from .test_run_build import PASSED, STARTED, Case, event


class FakeDisks:
    def __init__(self) -> None:
        self.attached: list[tuple[bool, bytes]] = []

    async def attach(self, path: Path, *, writable: bool = False) -> str:
        with path.open("r+b" if writable else "rb") as file:
            self.attached.append((writable, file.read(16)))
        return f"disk-{len(self.attached)}"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_the_guest_has_the_same_threshold() -> None:
    assert load("outputs").BULK == BULK_BYTES


def test_the_threshold() -> None:
    disks = FakeDisks()
    assert channel_for(BULK_BYTES, disks) == "frames"
    assert channel_for(BULK_BYTES + 1, disks) == "disk"
    assert channel_for(1 << 40, None) == "frames"


async def test_disks_of_a_build_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def make(tar: Path, disk: Path) -> None:
        disk.write_bytes(b"hsqs" + tar.read_bytes()[:4])

    monkeypatch.setattr(bulk, "make_source_disk", make)
    tar, disks = tmp_path / "source.tar", FakeDisks()
    with tar.open("wb") as file:
        file.truncate(BULK_BYTES + 1)
    async with open_bulk(disks, tar) as opened:
        assert opened.scratch is not None
        assert (opened.source, opened.scratch.serial) == ("disk-1", "disk-2")
        assert disks.attached == [(False, b"hsqs\0\0\0\0"), (True, bytes(16))]
        assert list(tmp_path.iterdir()) == [tar]
    with tar.open("wb") as file:
        file.truncate(BULK_BYTES)
    async with open_bulk(disks, tar) as opened:
        assert opened.source is None
    async with open_bulk(None, tar) as opened:
        assert (opened.source, opened.scratch) == (None, None)


async def test_without_sqfstar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tar = tmp_path / "source.tar"
    with tar.open("wb") as file:
        file.truncate(BULK_BYTES + 1)
    with pytest.raises(HostError, match="sqfstar"):
        async with open_bulk(FakeDisks(), tar):
            pass


@pytest.fixture
def scratch(tmp_path: Path) -> Any:
    with (tmp_path / "scratch").open("w+b") as file:
        file.write(b"t" * (BULK_BYTES + 512) + b"rest")
        file.truncate(2 * BULK_BYTES)
        yield Scratch(serial="scratch-b1", descriptor=file.fileno(), size=2 * BULK_BYTES)


def told(size: object) -> bytes:
    return STARTED + PASSED + event("outputs", missing=[]) + event("scratch", size=size)


async def test_outputs_on_the_disk(case: Case, scratch: Scratch) -> None:
    guest = FakeGuest(told(BULK_BYTES + 512) + encode(b"o") + encode(b"D"))
    report = await case.run(guest, bulk=Bulk(source="source-b1", scratch=scratch))
    assert report.outputs_channel == "disk"
    assert case.outputs.read_bytes() == b"t" * (BULK_BYTES + 512)
    # No source in frames beside the one on the disk.
    (begin,) = Decoder(HOST_KINDS).feed(guest.process.sent)
    assert (begin.json()["source"], begin.json()["scratch"]) == ("source-b1", "scratch-b1")


@pytest.mark.parametrize(
    "size", [None, "9000000", True, -512, 0, BULK_BYTES, BULK_BYTES + 1, 2 * BULK_BYTES + 512, 1 << 80, float(BULK_BYTES + 512)]
)
async def test_a_lie_about_the_size(case: Case, scratch: Scratch, size: object) -> None:
    await case.fail(ProtocolError, "bytes of outputs are on a disk", told(size), bulk=Bulk(source=None, scratch=scratch))


@pytest.mark.parametrize(
    "script",
    [
        STARTED + event("scratch", size=BULK_BYTES + 512),
        told(BULK_BYTES + 512) + event("scratch", size=BULK_BYTES + 512),
        told(BULK_BYTES + 512) + encode(b"O", b"more"),
        STARTED + PASSED + encode(b"O", b"some") + event("scratch", size=BULK_BYTES + 512),
        STARTED + PASSED + encode(b"o") + event("scratch", size=BULK_BYTES + 512),
    ],
)
async def test_a_disk_out_of_order(case: Case, scratch: Scratch, script: bytes) -> None:
    await case.fail(ProtocolError, "out of order|after their end", script, bulk=Bulk(source=None, scratch=scratch))


async def test_a_disk_that_was_never_given(case: Case) -> None:
    await case.fail(ProtocolError, "out of order", told(BULK_BYTES + 512))


def test_copied_outputs_count(tmp_path: Path, scratch: Scratch) -> None:
    with open_outputs_receiver(tmp_path / "outputs.tar", max_bytes=1000) as receiver:
        receiver.copy(scratch.descriptor, 0, 1000)
        with pytest.raises(BuildFailedError, match="larger than 1000 bytes"):
            receiver.copy(scratch.descriptor, 1000, 1)
    with open_outputs_receiver(tmp_path / "other.tar") as receiver, pytest.raises(ProtocolError, match="disk ends"):
        receiver.copy(scratch.descriptor, scratch.size - 1, 2)


def test_the_size_is_known_before_anything_is_packed(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / ("long" * 50)).write_bytes(bytes(1000))
    (tmp_path / "hard").hardlink_to(tmp_path / "dir" / ("long" * 50))
    (tmp_path / "soft").symlink_to("x")
    (tmp_path / "out").mkdir()
    exclude = [tmp_path / "out"]
    assert measure_source(tmp_path, exclude=exclude) == len(b"".join(pack_source(tmp_path, exclude=exclude)))


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([("a", "", ""), ("a", "", "")], "a comes twice"),
        ([("a", "5", ""), ("a", "", "")], "a comes twice"),
        ([("a", "", ""), ("a/b", "", "")], "a/b comes without its directory"),
        ([("d/a", "", "")], "d/a comes without its directory"),
        ([("s", "2", "/tmp"), ("s/a", "", "")], "s/a comes without its directory"),
        ([("h", "1", "later"), ("later", "", "")], "h is a hard link to a file that is not there"),
        ([("d", "5", ""), ("h", "1", "d")], "h is a hard link to a file that is not there"),
    ],
)
def test_members_out_of_place(members: list[tuple[str, str, str]], what: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind.encode() or tarfile.REGTYPE, link
            tar.addfile(info)
    buffer.seek(0)
    with pytest.raises(UsageError, match=what):
        clamp_tar(buffer, io.BytesIO(), 0)
