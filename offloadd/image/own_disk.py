"""The disk that a machine without `--snapshot` writes to: the image's own file, and no copy of it."""

from __future__ import annotations

from pathlib import Path

from offloadd.errors import ConfigError, OffloadError, Problem
from offloadd.image.disk_file import file_digest, find_file, read_disk
from offloadd.model.image import FileImage, ImageDeclaration
from offloadd.plan.machine import BootFiles


def own_disk(image: ImageDeclaration, folder: Path, machine: str) -> BootFiles:
    """What the machine boots from.  Blocks.

    Args:
        folder: that of the image's description.
    Raises:
        ConfigError: the image has no such file, or not for this.
        ImageError: it is no disk.
        NotFoundError: the image is not set up.
    """
    if not isinstance(image, FileImage):
        raise _unfit(image.name, "kind", f"{machine} writes to its disk: its image must be of kind file")
    image.check_set_up(machine)
    if image.path is None or image.size is not None or image.customize is not None:
        hint = f"copy the disk of `offload image build {image.name} --json` and name the copy as its `path`"
        raise _unfit(image.name, "path", f"{machine} writes to its disk, which must be a file as it is: {hint}")
    if image.format is None:
        # A guest writes whatever first bytes it likes.
        raise _unfit(image.name, "format", f"must be said, as {machine} writes to the disk: raw or qcow2")
    path = find_file(image, folder)
    digest = file_digest(image, folder)
    try:
        disk = read_disk(path, image.name, image.format)
    except OSError as exc:
        raise ConfigError([Problem(file=str(path), line=0, field="path", message=str(exc.strerror))]) from exc
    except OffloadError as exc:
        exc.subject = machine
        raise
    return BootFiles(image=image.name, digest=digest, disk=path, disk_format=disk.format, disk_size=disk.size)


def _unfit(image: str, field: str, message: str) -> ConfigError:
    return ConfigError([Problem(file=f"{image}.yaml", line=0, field=field, message=message)])
