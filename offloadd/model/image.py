"""What an image's YAML file declares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

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
    modules: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Kernel modules that the initramfs loads, in this order, with what they depend on."""
    files: Annotated[tuple[GuestFile, ...], Field(strict=False)] = ()
