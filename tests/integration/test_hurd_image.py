"""Disks of Debian GNU/Hurd's form, in real file systems: unpacked, grown, made guests of ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

from offloadd.errors import ImageError, OffloadError
from offloadd.image.accounts import INITTAB_LINE
from offloadd.image.customize import guest_files
from offloadd.image.store import Image, ImageStore
from offloadd.model.image import FileImage

from .hurd_disk import INITTAB, MIB, PASSWD, about, assert_sound, debian_tree, debugfs, gpt, make_ext, mbr, put, room

SYSTEMS = {
    "hurd-ext2": ("-t", "ext2", "-o", "hurd"),
    "ext2": ("-t", "ext2", "-I", "128"),
    "ext4": ("-t", "ext4", "-O", "metadata_csum,64bit"),
}


def declare(**fields: object) -> FileImage:
    return FileImage.model_validate({"kind": "file", "name": "hurd", "customize": "hurd-debian", **fields})


async def keep(tmp_path: Path, declared: FileImage, disk: Path) -> Image:
    async def find() -> Path:
        await trio.lowlevel.checkpoint()
        return disk

    return await ImageStore(tmp_path / "images").keep(declared, tmp_path, find)


def assert_ours(disk: Path, start: int) -> None:
    """Everything is in its place, nothing else is changed, and the file system is sound."""
    assert_sound(disk, start)

    def read(path: str) -> str:
        return debugfs(disk, start, f"cat {path}")

    assert read("/etc/passwd") == PASSWD + "offloading:x:900:900::/var/lib/offloading:/bin/sh\n"
    assert read("/etc/group") == "root:x:0:\ndemo:x:1000:\noffloading:x:900:\n"
    assert read("/etc/shadow").splitlines() == [
        "root:*:19000:0:99999:7:::",
        "demo:$y$j9T$abc:19000:0:99999:7:::",
        "offloading:*:18262:0:99999:7:::",
    ]
    assert read("/etc/gshadow").endswith("demo:!::\noffloading:!::\n")
    assert read("/etc/inittab") == INITTAB.replace("l2:2:wait", f"{INITTAB_LINE}\nl2:2:wait")
    assert read("/etc/ssh/sshd_config").startswith("# comment\nInclude /etc/ssh/sshd_config.d/*.conf\n")
    assert "\n#AcceptEnv" in read("/etc/ssh/sshd_config")
    for path, content in guest_files().items():
        assert read(path).encode() == content
    modes = {
        "/etc/passwd": (0o644, 0, 0),
        "/etc/shadow": (0o640, 0, 0),
        "/usr/lib/offload": (0o755, 0, 0),
        "/usr/lib/offload/secret-service": (0o755, 0, 0),
        "/usr/lib/offload/install-packages": (0o755, 0, 0),
        "/etc/ssh/sshd_config.d/offload.conf": (0o644, 0, 0),
        "/etc/ssh/authorized_keys.d": (0o755, 0, 0),
        "/var/lib/offloading": (0o755, 900, 900),
    }
    assert {path: about(disk, start, path) for path in modes} == modes


@pytest.mark.parametrize("system", SYSTEMS)
async def test_a_partition_becomes_a_guest_of_ours(tmp_path: Path, system: str) -> None:
    content = make_ext(tmp_path / "fs", 16 * MIB, debian_tree(tmp_path / "tree"), *SYSTEMS[system])
    disk = put(tmp_path / "disk.img", MIB, content, 17 * MIB)
    put(disk, 0, mbr((0x83, 1, 16)), 17 * MIB)
    before = disk.read_bytes()

    image = await keep(tmp_path, declare(path="disk.img"), disk)
    assert_ours(image.boot.disk, MIB)
    assert image.boot.disk.read_bytes()[:MIB] == before[:MIB]
    assert disk.read_bytes() == before
    assert sorted(file.name for file in image.directory.iterdir()) == ["disk", "image.json"]

    # Done twice, it is the same.
    again = await keep(tmp_path / "again", declare(path=str(image.boot.disk)), image.boot.disk)
    assert_ours(again.boot.disk, MIB)


async def test_of_two_partitions_the_one_with_the_hurd_is_taken(tmp_path: Path) -> None:
    other = make_ext(tmp_path / "other", 8 * MIB, debian_tree(tmp_path / "linux", hurd=False), "-t", "ext2")
    hurd = make_ext(tmp_path / "fs", 16 * MIB, debian_tree(tmp_path / "tree"), *SYSTEMS["hurd-ext2"])
    disk = put(tmp_path / "disk.img", MIB, other, 25 * MIB)
    put(disk, 9 * MIB, hurd, 25 * MIB)
    put(disk, 0, mbr((0x83, 1, 8), (0x83, 9, 16)), 25 * MIB)
    image = await keep(tmp_path, declare(path="disk.img"), disk)
    assert_ours(image.boot.disk, 9 * MIB)
    assert image.boot.disk.read_bytes()[MIB : 9 * MIB] == other


async def test_a_file_system_without_a_partition_table(tmp_path: Path) -> None:
    content = make_ext(tmp_path / "fs", 16 * MIB, debian_tree(tmp_path / "tree"), *SYSTEMS["hurd-ext2"])
    disk = put(tmp_path / "disk.img", 0, content, 16 * MIB)
    put(disk, 0, b"\xeb\xfe" * 255 + b"\x55\xaa", 16 * MIB)
    image = await keep(tmp_path, declare(path="disk.img"), disk)
    assert_ours(image.boot.disk, 0)


@pytest.mark.parametrize("table", ["mbr", "gpt", "none"])
async def test_it_grows_with_its_file_system(tmp_path: Path, table: str) -> None:
    content = make_ext(tmp_path / "fs", 16 * MIB, debian_tree(tmp_path / "tree"), *SYSTEMS["hurd-ext2"])
    start = 0 if table == "none" else 2 * MIB
    disk = put(tmp_path / "disk.img", start, content, 19 * MIB)
    if table == "gpt":
        gpt(disk, 2, 16)
    else:
        put(disk, 0, mbr((0x82, 1, 1), (0x83, 2, 16)) if table == "mbr" else b"\0" * 510 + b"\x55\xaa", 19 * MIB)
    image = await keep(tmp_path, declare(path="disk.img", size="64M"), disk)
    assert image.boot.disk_size == image.boot.disk.stat().st_size == 64 * MIB
    assert_ours(image.boot.disk, start)
    assert room(image.boot.disk, start) == {"mbr": 62, "gpt": 61, "none": 64}[table] * MIB
    data = image.boot.disk.read_bytes()
    if table == "gpt":
        assert data[-512:-504] == data[512:520] == b"EFI PART"
        # QEMU's firmware does not care, but Linux reads the second copy when the first is damaged.
        assert data[-33 * 512 : -512] == data[1024 : 1024 + 32 * 512]
    # A smaller size than it has is no size.
    same = await keep(tmp_path / "same", declare(path=str(disk), size="1M"), disk)
    assert same.boot.disk_size == 19 * MIB


async def test_folders_with_an_index_and_a_journal(tmp_path: Path) -> None:
    tree = debian_tree(tmp_path / "tree")
    for number in range(1500):
        (tree / "usr/lib" / f"lib{number:05}-with-a-long-name.so").write_bytes(b"")
    content = make_ext(tmp_path / "fs", 32 * MIB, tree, "-t", "ext4", "-O", "dir_index,metadata_csum", "-b", "1024")
    subprocess.run(["e2fsck", "-f", "-y", "-D", tmp_path / "fs"], stdout=subprocess.DEVNULL, check=False)
    content = (tmp_path / "fs").read_bytes()
    disk = put(tmp_path / "disk.img", MIB, content, 33 * MIB)
    put(disk, 0, mbr((0x83, 1, 32)), 33 * MIB)
    assert "Flags: 0x81000" in debugfs(disk, MIB, "stat /usr/lib"), "it has an index"
    image = await keep(tmp_path, declare(path="disk.img"), disk)
    assert_ours(image.boot.disk, MIB)
    assert "lib01499" in debugfs(image.boot.disk, MIB, "ls /usr/lib")


async def test_a_qcow2_file_becomes_raw(tmp_path: Path) -> None:
    content = make_ext(tmp_path / "fs", 16 * MIB, debian_tree(tmp_path / "tree"), *SYSTEMS["hurd-ext2"])
    disk = put(tmp_path / "disk.img", MIB, content, 17 * MIB)
    put(disk, 0, mbr((0x83, 1, 16)), 17 * MIB)
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(tmp_path / "disk.qcow2")]
    subprocess.run(argv, check=True)
    image = await keep(tmp_path, declare(path="disk.qcow2"), tmp_path / "disk.qcow2")
    assert image.boot.disk_format == "raw"
    assert_ours(image.boot.disk, MIB)


NOT_OURS = {
    "etc/inittab": "it has no /etc/inittab: does it start with sysvinit?",
    "usr/sbin/sshd": "openssh-server is not installed in it",
    "usr/bin/perl": "perl-base is not installed in it",
    "etc/shadow": "it has no /etc/shadow",
}


@pytest.mark.parametrize("missing", NOT_OURS)
async def test_what_is_no_debian_for_us(tmp_path: Path, missing: str) -> None:
    tree = debian_tree(tmp_path / "tree")
    (tree / missing).unlink()
    await refused(tmp_path, make_ext(tmp_path / "fs", 16 * MIB, tree, "-t", "ext2"), NOT_OURS[missing])


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("etc/inittab", "id:2:initdefault:\n", "starts no services with /etc/init.d/rc"),
        ("etc/passwd", "root:x:0:0::/:/bin/sh\nd:x:900:1::/:/bin/sh\n", "'d' has the number 900 already"),
        ("etc/passwd", "x" * (2 * MIB), "/etc/passwd in it is no small regular file"),
    ],
)
async def test_files_that_cannot_be_edited(tmp_path: Path, path: str, text: str, message: str) -> None:
    tree = debian_tree(tmp_path / "tree")
    (tree / path).write_text(text)
    await refused(tmp_path, make_ext(tmp_path / "fs", 16 * MIB, tree, "-t", "ext2"), message)


async def test_a_link_out_of_the_image_is_not_followed(tmp_path: Path) -> None:
    tree = debian_tree(tmp_path / "tree")
    (tmp_path / "secret").write_text("of the host")
    (tree / "etc/passwd").unlink()
    (tree / "etc/passwd").symlink_to(tmp_path / "secret")
    content = make_ext(tmp_path / "fs", 16 * MIB, tree, "-t", "ext2")
    await refused(tmp_path, content, "/etc/passwd in it is no small regular file")
    assert (tmp_path / "secret").read_text() == "of the host"


async def test_a_full_file_system(tmp_path: Path) -> None:
    tree = debian_tree(tmp_path / "tree")
    # Room for two files more.
    content = make_ext(tmp_path / "fs", 16 * MIB, tree, "-t", "ext2", "-I", "128", "-N", "32")
    await refused(tmp_path, content, "could not be put into it")


async def test_no_file_system_at_all(tmp_path: Path) -> None:
    await refused(tmp_path, bytes(16 * MIB), "no ext2, ext3 or ext4 file system in it has /hurd or /etc/passwd")


async def test_a_file_system_that_is_damaged(tmp_path: Path) -> None:
    content = bytearray(make_ext(tmp_path / "fs", 16 * MIB, debian_tree(tmp_path / "tree"), "-t", "ext2"))
    content[2048 : 4 * MIB] = b"\xa5" * (4 * MIB - 2048)
    await refused(tmp_path, bytes(content), "damaged|no ext2, ext3 or ext4 file system|cannot be made")


async def refused(tmp_path: Path, content: bytes, message: str) -> None:
    disk = put(tmp_path / "disk.img", MIB, content, 17 * MIB)
    put(disk, 0, mbr((0x83, 1, 16)), 17 * MIB)
    with pytest.raises(OffloadError, match=message) as caught:
        await keep(tmp_path, declare(path="disk.img"), disk)
    assert isinstance(caught.value, ImageError)
    assert "hurd" in caught.value.subject
    assert ImageStore(tmp_path / "images").list() == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (((0x83, 1, 100),), "its partition table makes no sense"),
        (((0x83, 1, 8), (0x83, 2, 8)), "its partition table makes no sense"),
        (((0x83, 1, 14), (0x82, 16, 1)), "its last partition (2) has no ext2, ext3 or ext4"),
        ((), "it has no ext2, ext3 or ext4"),
    ],
)
async def test_tables_that_are_not_grown(tmp_path: Path, parts: tuple[tuple[int, int, int], ...], message: str) -> None:
    disk = put(tmp_path / "disk.img", 0, mbr(*parts), 17 * MIB)
    with pytest.raises(ImageError) as caught:
        await keep(tmp_path, declare(path="disk.img", size="64M", customize=None), disk)
    assert message in caught.value.what
