"""Where QEMU's user-mode emulators are."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from offloadd.errors import HostError
from offloadd.model.system import SYSTEMS, System

_PT_INTERP = 3
_HEADER = struct.Struct("<16sHHIQQQIHHH")
"""Elf64_Ehdr up to e_phnum."""
_SEGMENT_SIZE = 56
"""Of Elf64_Phdr."""
PACKAGE = "qemu-user-static"
"""Debian's; from its release 13 on the programs themselves are in qemu-user, and what provides this name brings them."""
HINT = f"install the Debian package {PACKAGE}: sudo apt-get install {PACKAGE}"


def find_emulator(system: System) -> Path:
    """The emulator of `system`: one that works inside an environment, where no library of the host is.

    Raises:
        HostError: it is not installed, or only one that needs libraries.
    """
    names = (f"qemu-{system.user}-static", f"qemu-{system.user}")
    found = [Path(path) for path in map(shutil.which, names) if path]
    usable = next((path for path in found if not needs_loader(path)), None)
    if usable is not None:
        return usable.absolute()
    if found:
        what = f"{found[0]} needs libraries of the host, which an environment does not have"
        raise HostError(what, subject=system.name, hint=HINT)
    raise HostError(f"qemu-{system.user} is not installed", subject=system.name, hint=HINT)


def find_emulated(native: Collection[str]) -> list[str]:
    """The systems whose emulator is installed, without the `native` ones, which need none."""
    found = []
    for system in SYSTEMS.values():
        if system.user is not None and system.name not in native:
            with suppress(HostError):
                find_emulator(system)
                found.append(system.name)
    return found


def needs_loader(program: Path) -> bool:
    """Whether an ELF program names a dynamic loader, which the kernel looks for in the root that the program is run in.

    False for what cannot be read: nothing is known of it.
    """
    try:
        descriptor = os.open(program, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _PT_INTERP in _segments(descriptor)
    except (OSError, struct.error):
        return False
    finally:
        os.close(descriptor)


def _segments(descriptor: int) -> list[int]:
    """The types of the segments (elf(5)) of a 64-bit little-endian program; none for another."""
    ident, *_, start, _, _, _, size, count = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
    if ident[:6] != b"\x7fELF\x02\x01" or size != _SEGMENT_SIZE:
        return []
    table = os.pread(descriptor, size * count, start)
    return [struct.unpack_from("<I", table, index * size)[0] for index in range(count)]
