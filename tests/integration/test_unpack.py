"""Compressed disks, good ones and hostile ones, through the real program that unpacks them."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import trio

from offloadd.errors import ImageError
from offloadd.image import keep
from offloadd.image.store import Image, ImageStore
from offloadd.image.unpack import packing
from offloadd.model.image import FileImage

MIB = 1 << 20
DISK = (b"\xfa" * 510 + b"\x55\xaa").ljust(3 * MIB, b"\0") + b"end of the disk\n".ljust(MIB, b"\0")


def tar_of(*members: tuple[str, bytes | str]) -> bytes:
    """A tar with files (bytes), links (str) and directories (a name that ends in a slash)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


async def kept(tmp_path: Path, name: str, content: bytes, told: list[str] | None = None) -> Image:
    file = tmp_path / name
    file.write_bytes(content)

    async def find() -> Path:
        await trio.lowlevel.checkpoint()
        return file

    def tell(phase: str, fraction: float | None) -> None:
        if told is not None:
            told.append(f"{phase} {fraction}")

    declared = FileImage.model_validate({"kind": "file", "name": "disk", "path": name})
    return await ImageStore(tmp_path / "images").keep(declared, tmp_path, find, tell)


TAR = tar_of(("./", b""), ("./debian-hurd.img", DISK))
PACKED = {
    "disk.img.gz": gzip.compress(DISK),
    "disk.img.xz": lzma.compress(DISK) + lzma.compress(b""),
    "DISK.IMG.ZST": zstd(DISK),
    "disk.img.tar": TAR,
    "disk.img.tar.gz": gzip.compress(TAR),
    "disk.tgz": gzip.compress(TAR),
    "disk.img.tar.xz": lzma.compress(TAR),
    "disk.tar.zst": zstd(TAR),
}


@pytest.mark.parametrize("name", PACKED)
async def test_what_is_published_is_unpacked_sparsely(tmp_path: Path, name: str) -> None:
    told: list[str] = []
    image = await kept(tmp_path, name, PACKED[name], told)
    assert image.boot.disk.read_bytes() == DISK
    assert image.boot.disk_size == len(DISK)
    assert image.boot.disk.stat().st_blocks * 512 < MIB
    assert any(line.startswith(f"unpacking {name} ") for line in told)
    await ImageStore(tmp_path / "images").verify(image)


async def test_a_sparse_tar_as_gnu_tar_makes_it(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"")
    with (tmp_path / "disk.img").open("r+b") as file:
        file.write(DISK[:512])
        file.seek(3 * MIB)
        file.write(DISK[3 * MIB :])
    for form in ("gnu", "pax"):
        made = tmp_path / f"{form}.tar.xz"
        subprocess.run(["tar", "-cSJf", made, f"--format={form}", "-C", tmp_path, "disk.img"], check=True)
        (tmp_path / form).mkdir()
        image = await kept(tmp_path / form, made.name, made.read_bytes())
        assert image.boot.disk.read_bytes() == DISK


REFUSED = {
    "two.tar": (tar_of(("a", DISK), ("b", b"x")), "it has several files: one disk is expected"),
    "link.tar": (tar_of(("a", "/etc/shadow")), "'a' in it is no file"),
    "link-after.tar": (tar_of(("a", DISK), ("b", "/etc/shadow")), "'b' in it is no file"),
    "folder.tar.gz": (gzip.compress(tar_of(("a/", b""))), "it has no file"),
    "none.tar": (b"\0" * 10240, "it has no file"),
    "cut.tar": (TAR[: 2 * MIB], "it is damaged"),
    "cut.img.gz": (gzip.compress(os.urandom(MIB))[:-1000], "it is damaged"),
    "cut.img.xz": (lzma.compress(os.urandom(MIB))[:-1000], "it is damaged"),
    "cut.img.zst": (zstd(os.urandom(MIB))[:-1000], "it is damaged"),
    "no.img.xz": (DISK, "it is damaged"),
    "no.img.gz": (DISK, "it is damaged"),
    "no.img.zst": (DISK, "it is damaged"),
    "no.tar.gz": (gzip.compress(DISK), "it is damaged"),
    "bomb.img.gz": (gzip.compress(bytes(9 * MIB)), "it unpacks to more than"),
    "bomb.img.xz": (lzma.compress(bytes(9 * MIB)), "it unpacks to more than"),
    "bomb.tar.xz": (lzma.compress(tar_of(("a", bytes(9 * MIB)))), "it unpacks to more than"),
    "data.img.gz": (gzip.compress(b"no disk" * 1000), "has no boot sector"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_refused_leaves_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = REFUSED[name]
    monkeypatch.setattr(keep, "MAX_DISK_BYTES", 8 * MIB)
    with pytest.raises(ImageError) as caught:
        await kept(tmp_path, name, content)
    assert message in caught.value.what
    assert "Traceback" not in caught.value.render()
    store = tmp_path / "images"
    assert ImageStore(store).list() == []
    assert [path for path in store.rglob("*") if path.is_file() and path.parent.name != ".lock"] == []


def header_of_a_giant(size: int) -> bytes:
    """A pax header that says of itself to be larger than memory, and as many zeros as fit."""
    info = tarfile.TarInfo("giant")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT)


async def test_a_header_that_wants_all_memory(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as out:
        out.write(header_of_a_giant(1 << 33))
        zeros = bytes(16 * MIB)
        for _ in range(80):
            out.write(zeros)
    with pytest.raises(ImageError, match=r"more memory|damaged"):
        await kept(tmp_path, "giant.tar.gz", raw.getvalue())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://h/debian-hurd.img.tar.xz?x=1.gz", "tar.xz"),
        ("/gnu/store/abc-image.qcow2", ""),
        ("a.tzst", "tar.zst"),
        ("A.TXZ", "tar.xz"),
        ("tar", ""),
        (".gz", ""),
        ("a.tar.bz2", "tar.bz2"),
        ("what?.gz", "gz"),
    ],
)
def test_what_a_name_says(name: str, expected: str) -> None:
    assert packing(name) == expected
