"""The cpio writer and the order of modules."""

from __future__ import annotations

import gzip
import lzma
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.image.initramfs import InitramfsError, Member, make_initramfs, resolve_modules, write_cpio

DEP = """\
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko.xz:
"""


def read_cpio(data: bytes) -> list[tuple[str, int, bytes]]:
    """An independent reader of newc: (name, mode, content)."""
    members: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        at = -(-(at + 110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return members
        members.append((name, fields[1], data[at : at + size]))
        at = -(-(at + size) // 4) * 4


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40)


@given(st.lists(st.tuples(names, st.integers(0, 0o177777), st.binary(max_size=200)), max_size=8))
def test_cpio_reads_back(files: list[tuple[str, int, bytes]]) -> None:
    archive = write_cpio(Member(name=name, mode=mode, content=content) for name, mode, content in files)
    assert len(archive) % 4 == 0
    assert read_cpio(archive) == files


def test_cpio_is_the_same_each_time() -> None:
    members = [Member(name="dev", mode=stat.S_IFDIR | 0o755), Member(name="dev/console", mode=stat.S_IFCHR, device=(5, 1))]
    archive = write_cpio(members)
    assert archive == write_cpio(members)
    # The device's numbers stand in the two fields before the length of the name.
    assert b"0000000500000001" in archive


def test_modules_come_after_what_they_need_and_once() -> None:
    order = [path.rsplit("/", 1)[1] for path in resolve_modules(["virtio_pci", "virtio-blk", "virtio_rng"], DEP)]
    assert order == ["virtio_ring.ko", "virtio.ko", "virtio_pci.ko", "virtio_blk.ko", "virtio-rng.ko.xz"]


def test_builtin_modules_need_no_loading() -> None:
    assert resolve_modules(["ext4"], DEP, "kernel/fs/ext4/ext4.ko\n") == []


def test_missing_modules_are_all_named() -> None:
    with pytest.raises(InitramfsError, match="nope, neither"):
        resolve_modules(["nope", "virtio", "neither"], DEP)


def test_make_initramfs(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/modules/6.1.0"
    for path in ("kernel/drivers/virtio/virtio_ring.ko", "kernel/drivers/virtio/virtio.ko"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    (folder / "modules.dep").write_text(DEP)
    for path in ("usr/bin/busybox", "usr/lib/offload/initramfs-init"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"#!")
    plain = make_initramfs(tmp_path, "6.1.0", ["virtio"])
    found = {name: (mode, content) for name, mode, content in read_cpio(plain)}
    assert found["modules.list"][1] == b"/modules/virtio_ring.ko\n/modules/virtio.ko\n"
    assert found["init"][0] == stat.S_IFREG | 0o755
    assert gzip.decompress(make_initramfs(tmp_path, "6.1.0", ["virtio"], compress=True)) == plain
    # A kernel whose modules are compressed gives the same: the guest has nothing to decompress.
    for path in ("kernel/drivers/virtio/virtio_ring.ko", "kernel/drivers/virtio/virtio.ko"):
        (folder / f"{path}.xz").write_bytes(lzma.compress((folder / path).read_bytes()))
    (folder / "modules.dep").write_text(DEP.replace("virtio_ring.ko", "virtio_ring.ko.xz").replace("virtio.ko", "virtio.ko.xz"))
    assert make_initramfs(tmp_path, "6.1.0", ["virtio"]) == plain
    (folder / "kernel/drivers/virtio/virtio.ko.xz").write_bytes(b"\xfd7zXZ\0 and no more")
    with pytest.raises(InitramfsError, match="cannot decompress"):
        make_initramfs(tmp_path, "6.1.0", ["virtio"])
    (folder / "modules.dep").write_text("kernel/drivers/virtio/virtio.ko.zst:\n")
    (folder / "kernel/drivers/virtio/virtio.ko.zst").write_bytes(b"")
    with pytest.raises(InitramfsError, match=r"not known here: virtio\.ko\.zst"):
        make_initramfs(tmp_path, "6.1.0", ["virtio"])
    (folder / "modules.dep").write_text(DEP)
    (tmp_path / "usr/bin/busybox").unlink()
    with pytest.raises(InitramfsError, match="busybox"):
        make_initramfs(tmp_path, "6.1.0", ["virtio"])
