"""What an image's YAML file declares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from offloadd.errors import NotFoundError
from offloadd.model.base import Name, Size, Text, Value

Package = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9.+:~-]+)?$")]
"""A Debian package name, with an optional architecture and version."""

Suite = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^(/[a-zA-Z0-9@_+-][a-zA-Z0-9@._+-]*)+$")]


class GuestFile(Value):
    """One file that is put into the guest, or all files of a directory, which go below `path`."""

    path: AbsolutePath
    source: Text
    """Relative to the folder of the recipe that says so."""
    mode: Annotated[str, StringConstraints(pattern=r"^0[0-7]{3}$")] = "0644"


class ImageRecipe(Value):
    """A disk image with Debian's kernel and our own init."""

    kind: Literal["debian"]
    name: Name
    suite: Suite
    architecture: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+$")] = "amd64"
    kernel: Package
    packages: Annotated[tuple[Package, ...], Field(strict=False)] = ()
    size: Size
    """Of the root file system; the file is sparse."""
    mirror: Text | None = None
    """By default that of the host's apt configuration."""
    check_valid_until: bool = True
    """Whether package indexes are refused whose time has passed: a snapshot's has, and now and then that of a mirror of sid."""
    modules: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Kernel modules that the initramfs loads, in this order, with what they depend on."""
    files: Annotated[tuple[GuestFile, ...], Field(strict=False)] = ()


DiskFormat = Literal["raw", "qcow2"]
SECTOR = 512
MAX_DISK_BYTES = 256 << 30
"""The largest disk of somebody else's that is unpacked or grown: what a small archive can make us write has an end."""


Customization = Literal["hurd-debian"]


class FileImage(Value):
    """A disk that somebody else has made, with boot loader, kernel and init of its own: `guix system image` makes such.

    One that has neither `path` nor `url` is declared but not set up: it waits for its user to say where it is.
    """

    kind: Literal["file", "url"]
    """The same thing twice: `url` only says that it is fetched."""
    name: Name
    path: Text | None = None
    """The file; relative to the folder of the description that says so."""
    url: Text | None = None
    """Where it is fetched from, when there is no `path`."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the file as it lies there, compressed or not; what is fetched must have one."""
    format: DiskFormat | None = None
    """By default what its first bytes say.  Say it of a disk that a guest has written: that can be any first bytes."""
    size: Size | None = None
    """The disk is made that large when it is smaller, its last partition and the ext2, ext3 or ext4 in it too."""
    customize: Customization | None = None
    """What is put into its file system before the first boot: our files, for a system that does not know us."""
    firmware: Literal["bios"] = "bios"
    """What the machine starts with, and the disk's boot loader expects."""

    @field_validator("url")
    @classmethod
    def _can_be_fetched(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("https://", "http://")):
            raise ValueError("must begin with https:// or http://")
        return url

    @field_validator("size")
    @classmethod
    def _has_whole_sectors(cls, size: int | None) -> int | None:
        if size is not None and not (0 < size <= MAX_DISK_BYTES and size % SECTOR == 0):
            raise ValueError(f"must be whole sectors of {SECTOR} bytes, and at most {MAX_DISK_BYTES >> 30}G")
        return size

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> FileImage:
        if self.path is not None and (self.url is not None or self.kind == "url"):
            raise ValueError("takes `path` (kind file) or `url`, not both")
        if self.url is not None and self.sha256 is None:
            raise ValueError("needs the `sha256` of what is fetched from `url`")
        return self

    @property
    def is_set_up(self) -> bool:
        """Whether it is said where the disk is."""
        return self.path is not None or self.url is not None

    def check_set_up(self, machine: str = "") -> None:
        """Raise NotFoundError, about `machine`, unless it is set up."""
        if not self.is_set_up:
            hint = f"offload image set {self.name} FILE-OR-URL"
            raise NotFoundError(f"its image {self.name} is not set up", subject=machine, hint=hint)


ImageDeclaration = ImageRecipe | FileImage

IMAGE_KINDS: dict[str, type[ImageRecipe] | type[FileImage]] = {"debian": ImageRecipe, "file": FileImage, "url": FileImage}
