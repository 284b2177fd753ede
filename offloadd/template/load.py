"""A template in memory: checked while it is read, and out of everybody's reach afterwards."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offloadd.digest import sparse_sha256
from offloadd.errors import HostError, ImageError
from offloadd.model.quantity import format_date
from offloadd.template.freeze import DISK, MANIFEST, RAM, STATE
from offloadd.vm.memory import SavedGuest, read_memory, seal_memory

_OURS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EPERM, errno.ENOSYS)
"""What the host lacks, where others say that the file is damaged."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """One template on the disk."""

    digest: str
    machine: str
    """The one for which it was made; others may use it too."""
    facts: dict[str, Any]
    made: str
    directory: Path
    files: dict[str, dict[str, Any]]
    used: float
    """When a guest was last made of it, in seconds since 1970."""

    def size_on_disk(self) -> int:
        """Bytes; holes do not count."""
        return sum(path.stat().st_blocks * 512 for path in self.directory.iterdir())

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "machine": self.machine,
            **{name: self.facts.get(name) for name in ("image", "image_digest", "cpu", "cpu_count", "memory_mib")},
            **{name: self.facts.get(name) for name in ("system", "accelerator", "qemu_version", "machine_type")},
            "made": self.made,
            "used": format_date(datetime.fromtimestamp(self.used, UTC)),
            "directory": str(self.directory),
            "size_on_disk": self.size_on_disk(),
        }


def read_template(directory: Path) -> Template:
    """The template in `directory`.

    Raises:
        ImageError: its manifest is damaged.
    """
    try:
        data = json.loads((directory / MANIFEST).read_text())
        found = Template(
            digest=data["digest"],
            machine=data["machine"],
            facts=dict(data["facts"]),
            made=data["made"],
            directory=directory,
            files={name: _file_facts(data["files"][name]) for name in (RAM, STATE, DISK)},
            used=(directory / MANIFEST).stat().st_mtime,
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ImageError(f"its manifest cannot be read: {exc}", subject=f"template {directory.name[:12]}") from exc
    if found.digest != directory.name:
        raise ImageError("its manifest is another one's", subject=f"template {directory.name[:12]}")
    return found


def _file_facts(file: Any) -> dict[str, Any]:
    return {"size": int(file["size"]), "sparse_sha256": str(file["sparse_sha256"])}


def load_template(template: Template) -> SavedGuest:
    """The template's files in memory, each compared with what was made.  Blocks.

    Raises:
        ImageError: one is missing, shorter or different.
    """
    held: list[int] = []
    try:
        for name in (RAM, STATE, DISK):
            held.append(_load(template, name))
    except BaseException:
        for fd in held:
            os.close(fd)
        raise
    ram, state, disk = held
    return SavedGuest(digest=template.digest, ram=ram, state=state, frozen=disk)


def _load(template: Template, name: str) -> int:
    subject, made = f"template {template.digest[:12]}", template.files[name]
    try:
        fd = read_memory(template.directory / name)
    except OSError as exc:
        if exc.errno in _OURS:
            raise HostError(f"cannot be kept in memory: {exc.strerror}", subject=subject, hint="offload doctor") from exc
        raise ImageError(f"{name}: {exc.strerror}", subject=subject) from exc
    try:
        size = os.fstat(fd).st_size
        if size != made["size"]:
            raise ImageError(f"{name} has {size} bytes instead of {made['size']}", subject=subject)
        if sparse_sha256(Path(f"/proc/self/fd/{fd}")) != made["sparse_sha256"]:
            raise ImageError(f"the content of {name} is not what was saved", subject=subject)
        seal_memory(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd
