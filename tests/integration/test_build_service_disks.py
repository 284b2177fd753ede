"""The guest's build service with its source and its outputs on disks: real ones, which loop devices are."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from offloadd.builder.bulk import make_source_disk
from offloadd.builder.outputs import open_outputs_receiver, unpack_outputs
from offloadd.builder.prepare import prepare_source
from offloadd.builder.source import pack_source
from tests.integration.test_build_service import Session, exits, mark, serve, state, wait_until_gone

__all__ = ["state"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the build service mounts and makes namespaces: it must be root")

NEWEST = 1_577_836_800


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Not below /tmp, where the service mounts the build's root: it could not find its own things again, nor these."""
    with TemporaryDirectory(dir="/var/tmp", prefix="offload-disks-") as name:
        yield Path(name)


PlugIn = Callable[[str, Path], str]


@contextmanager
def _loop_device(path: Path, *options: str) -> Iterator[str]:
    done = subprocess.run(["losetup", "--find", "--show", *options, path], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def plug_in(tmp_path: Path) -> Iterator[PlugIn]:
    """Make a file a disk of this serial, as sysfs below `tmp_path`/sys shows it; its device."""
    with ExitStack() as stack:
        (tmp_path / "sys/block").mkdir(parents=True)

        def plug(serial: str, path: Path) -> str:
            device = stack.enter_context(_loop_device(path, *(["--read-only"] if serial == "source" else [])))
            folder = tmp_path / "sys/block" / Path(device).name
            folder.mkdir()
            (folder / "serial").write_text(serial)
            return device

        yield plug


@pytest.fixture
def service(state: Path, tmp_path: Path, plug_in: PlugIn) -> Iterator[Session]:
    with serve(state, "--sys", str(tmp_path / "sys")) as session:
        yield session


async def source_disk(tmp_path: Path, tree: Path) -> Path:
    """The disk that the host makes of `tree`."""
    sent, tar, disk = (tmp_path / name for name in ("sent.tar", "source.tar", "source.squashfs"))
    sent.write_bytes(b"".join(pack_source(tree)))
    prepare_source(sent, [], tar, NEWEST)
    await make_source_disk(tar, disk)
    return disk


def make_tree(tree: Path) -> None:
    (tree / "dir/below").mkdir(parents=True)
    (tree / "dir/file").write_text("in a directory\n")
    (tree / "dir/below/deep").write_text("deep\n")
    (tree / "one").write_text("one\n")
    (tree / "two").hardlink_to(tree / "one")
    (tree / "soft").symlink_to("dir/file")
    (tree / "tool").write_text("#!/bin/sh\necho runs\n")
    (tree / "tool").chmod(0o755)
    (tree / "locked").mkdir()
    (tree / "locked/in").write_text("x")
    os.utime(tree / "tool", (1e9, 1e9))
    (tree / "locked").chmod(0o555)
    (tree / "not-utf-8-\udcff").symlink_to("x")


async def test_a_source_on_a_disk_looks_as_if_it_was_unpacked(service: Session, tmp_path: Path, plug_in: PlugIn) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    make_tree(tree)
    plug_in("source", await source_disk(tmp_path, tree))
    # How many names a directory has is said only by some file systems.
    look = r"find . -type d -printf '%P %y %m %U:%G\n' -o -printf '%P %y %m %U:%G %n %l\n' | sort"
    look += "; for file in tool dir locked one soft; do stat -c '%n %Y' $file; done"
    service.begin(source="source", steps=[look, "./tool"])
    service.read_all()
    with serve(service.state) as unpacked:
        unpacked.send_build((tmp_path / "source.tar").read_bytes(), steps=[look, "./tool"])
        unpacked.read_all()
    assert exits(service) == exits(unpacked) == [(0, 2)]
    assert service.log.decode(errors="replace").splitlines() == unpacked.log.decode(errors="replace").splitlines()
    assert b"two f 644 1000:1000 2" in service.log


async def test_a_source_on_a_disk_can_be_changed_in_every_way(service: Session, tmp_path: Path, plug_in: PlugIn) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    make_tree(tree)
    plug_in("source", await source_disk(tmp_path, tree))
    steps = [
        # rename(2), and not mv, which would copy where it fails.
        '/usr/bin/python3 -c \'import os; os.rename("dir", "moved")\' && cat moved/file moved/below/deep && test ! -e dir',
        "mkdir dir && echo new > dir/file && test ! -e dir/below",
        # A file with two names is one file, also when it is written.
        "echo more >> one && cat two && test one -ef two && test $(stat -c %h two) = 2",
        "ln tool linked && chmod 600 tool && stat -c '%a %h %Y' linked && cat linked | head -n 1",
        "touch -d @5 moved/file && stat -c %Y moved/file && cat moved/file",
        "chmod 755 locked && rm -r locked && mkdir locked && rmdir locked && rm soft",
        "printf X | dd of=moved/below/deep conv=notrunc status=none && cat moved/below/deep",
        "stat -c %Y . >/dev/null; touch here; test $(find . -xdev -type f | wc -l) = 8; ls",
        "! touch /sub 2>/dev/null; touch /build/beside",
    ]
    service.begin(source="source", steps=steps)
    service.read_all()
    assert exits(service) == [(0, len(steps))], service.log
    assert service.log.decode(errors="surrogateescape").splitlines() == [
        *("in a directory", "deep", "one", "more", "600 2 1000000000", "#!/bin/sh", "5", "in a directory", "Xeep"),
        *("dir", "here", "linked", "moved", "not-utf-8-\udcff", "one", "tool", "two"),
    ]


async def test_the_outputs_are_packed_from_both_layers(service: Session, tmp_path: Path, plug_in: PlugIn) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    make_tree(tree)
    plug_in("source", await source_disk(tmp_path, tree))
    service.begin(source="source", steps=["echo new > dir/new; rm one"], outputs=["**"])
    service.read_all()
    (tmp_path / "outputs.tar").write_bytes(service.tar)
    with tarfile.open(tmp_path / "outputs.tar") as tar:
        names = {member.name for member in tar}
        assert tar.getmember("tool").mtime == 1_000_000_000
        assert tar.getmember("tool").mode == 0o755
    assert {"dir/new", "dir/file", "dir/below/deep", "two", "soft", "locked/in"} <= names
    assert "one" not in names


def big_outputs(size: int) -> list[str]:
    return [f"mkdir out; head -c {size} /dev/urandom > out/big; seq 100000 > out/numbers; sha256sum out/*; touch -d @7 out/big"]


async def test_much_output_goes_to_the_scratch_disk(service: Session, tmp_path: Path, plug_in: PlugIn) -> None:
    scratch = tmp_path / "scratch"
    with scratch.open("wb") as file:
        file.truncate(64 << 20)
    device = plug_in("scratch", scratch)
    service.send_build(bytes(1024), scratch="scratch", steps=big_outputs(30_000_001), outputs=["out"])
    service.read_all()
    assert service.tar == b""
    (event,) = service.events("scratch")
    subprocess.run(["blockdev", "--flushbufs", device], check=True)
    with open_outputs_receiver(tmp_path / "outputs.tar") as receiver, scratch.open("rb") as file:
        receiver.copy(file.fileno(), 0, event["size"])
        receiver.finish()
    unpack_outputs(tmp_path / "outputs.tar", tmp_path / "out")
    sums = subprocess.run(["sha256sum", "out/big", "out/numbers"], cwd=tmp_path / "out", check=True, capture_output=True)
    assert sums.stdout == service.log
    assert (tmp_path / "out/out/big").stat().st_mtime == 7
    assert [frame.kind for frame in service.frames[-2:]] == [b"o", b"D"]


@pytest.mark.parametrize(("size", "channel"), [((8 << 20) - 4096, b"O"), (8 << 20, b"E")])
async def test_little_output_stays_in_frames(
    service: Session, tmp_path: Path, plug_in: PlugIn, size: int, channel: bytes
) -> None:
    scratch = tmp_path / "scratch"
    scratch.write_bytes(bytes(16 << 20))
    plug_in("scratch", scratch)
    service.send_build(bytes(1024), scratch="scratch", steps=[f"head -c {size} /dev/zero > out"], outputs=["out"])
    service.read_all()
    assert service.frames[-3].kind == channel
    assert len(service.events("scratch")) == (channel == b"E")


async def test_more_output_than_the_disk_holds(service: Session, tmp_path: Path, plug_in: PlugIn) -> None:
    scratch = tmp_path / "scratch"
    scratch.write_bytes(bytes(16 << 20))
    plug_in("scratch", scratch)
    service.send_build(bytes(1024), scratch="scratch", steps=["head -c 17000000 /dev/zero > out"], outputs=["out"])
    service.read_all()
    assert service.error == "they are larger than the disk for them"
    assert service.events("scratch") == []


async def test_a_cancelled_build_lets_go_of_its_disks(service: Session, tmp_path: Path, plug_in: PlugIn) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    make_tree(tree)
    device = plug_in("source", await source_disk(tmp_path, tree))
    service.begin(source="source", steps=[f"rm one; sleep {mark(4000)}"])
    service.read(lambda: bool(service.events("step")))
    service.cancel()
    wait_until_gone(mark(4000))
    # Nobody holds it any more: a device that is mounted somewhere could not be opened like this.
    os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
