"""Disks that somebody else has made: what they are, and what identifies them.

The qcow2 header is that of QEMU's docs/interop/qcow2.txt, versions 2 and 3.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offloadd.digest import json_digest
from offloadd.errors import ConfigError, ImageError, Problem
from offloadd.image import customize
from offloadd.image.customize import guest_files
from offloadd.image.unpack import packing
from offloadd.model.image import SECTOR, DiskFormat, FileImage

FORMAT = 2
"""Raised when what is kept of the same file begins to differ."""
DISK = "disk"

_QCOW2 = struct.Struct(">4sIQIIQI")
"""Magic, version, place and length of the backing file's name, cluster bits, size in bytes, method of encryption."""
_MAGIC = b"QFI\xfb"
_FEATURES_AT = 72
_EXTERNAL_DATA = 1 << 2
"""Bit of `incompatible_features`: the data are in another file."""
_BOOT_SIGNATURE = b"\x55\xaa"


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What a guest is told of a disk file."""

    format: DiskFormat
    size: int
    """Bytes, as the guest sees it."""


def read_disk(path: Path, name: str, declared: DiskFormat | None = None) -> Disk:
    """Look at a disk file.  Blocks.

    Args:
        name: the image's.
        declared: its format; by default what its first bytes say.
    Raises:
        ImageError: QEMU must not be given it, or could not boot from it.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(max(SECTOR, _FEATURES_AT + 8))
        length = os.fstat(file.fileno()).st_size
    form = declared or ("qcow2" if head.startswith(_MAGIC) else "raw")
    if form == "raw":
        if head[SECTOR - 2 : SECTOR] != _BOOT_SIGNATURE:
            hint = "is it compressed (its name must say so), or made for UEFI alone? it must be a whole disk, raw or qcow2"
            raise ImageError("has no boot sector, which a PC's firmware starts", subject=name, hint=hint)
        size = length
    else:
        size = _read_qcow2(head, name)
    if size <= 0 or size % SECTOR:
        raise ImageError(f"no disk has {size} bytes: they are no whole sectors", subject=name)
    return Disk(format=form, size=size)


def _read_qcow2(head: bytes, name: str) -> int:
    """The size of the disk in a qcow2 file; ImageError when it would lead QEMU to other files."""
    hint = "`qemu-img convert -O qcow2 OLD NEW` makes one that stands alone"
    if len(head) < _FEATURES_AT + 8 or not head.startswith(_MAGIC):
        raise ImageError("is no qcow2 file", subject=name)
    _, version, backing_at, backing_length, _, size, encryption = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise ImageError(f"is a qcow2 file of version {version}, not 2 or 3", subject=name)
    features = int.from_bytes(head[_FEATURES_AT : _FEATURES_AT + 8], "big") if version == 3 else 0
    # Whoever wrote the name of another file into it would have QEMU read that one to the guest.
    if backing_at or backing_length or features & _EXTERNAL_DATA:
        raise ImageError("needs another file below it: only a whole disk is taken", subject=name, hint=hint)
    if encryption:
        raise ImageError("is encrypted", subject=name, hint=hint)
    return int(size)


def find_file(image: FileImage, folder: Path) -> Path:
    """The file of an image with a `path`, which is relative to `folder`."""
    assert image.path is not None
    return folder / image.path


def file_digest(image: FileImage, folder: Path) -> str:
    """The digest of an image: of its content where that is declared, else of which file it is, and when it was changed; and of
    what is done with it.

    Looks at no content: a disk of some GB would take seconds each time that machines are listed.

    Raises:
        NotFoundError: it is not set up.
        ConfigError: there is no such file.
    """
    image.check_set_up()
    facts: dict[str, Any] = {"format": FORMAT, "kind": "file", "name": image.name, "disk": image.format}
    facts |= {"firmware": image.firmware, "packing": packing(image.path or image.url or ""), "size": image.size}
    if image.customize is not None:
        files = {path: hashlib.sha256(content).hexdigest() for path, content in guest_files().items()}
        facts |= {"customize": [image.customize, customize.FORMAT, files]}
    return json_digest({**facts, "content": image.sha256 or file_identity(find_file(image, folder))})


def file_identity(path: Path) -> list[Any]:
    """What changes when the file does.  Raises ConfigError: there is no such file."""
    try:
        about = path.stat()
    except OSError as exc:
        raise ConfigError([Problem(file=str(path), line=0, field="path", message=str(exc.strerror))]) from exc
    if not stat.S_ISREG(about.st_mode):
        # A fifo would be read for ever.
        raise ConfigError([Problem(file=str(path), line=0, field="path", message="is not a regular file")])
    return [str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino]
