"""What is written to binfmt_misc: how it is mounted, registrations made, and taken away."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from offloadd.binfmt.magic import Magic
from offloadd.errors import HostError, NotAllowedError

FLAGS = "OPF"
"""F: the emulator is opened now, so it is found in every root.  P: the program keeps its argv[0] (QEMU 6 and Linux 5.12 on).
O: a program that may be run but not read works, as without an emulator.  Not C: it would give set-user-ID programs of any
architecture their rights, with an emulator in between that was not written for that."""


def mount(root: Path) -> None:
    """Mount binfmt_misc unless it is.

    Raises:
        NotAllowedError: we may not.
        HostError: the kernel does not have it.
    """
    if (root / "register").exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"binfmt_misc", os.fsencode(root), b"binfmt_misc", 0, None) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EPERM, errno.EACCES):
        hint = "inside a container: register on its host, or give it the right to mount"
        raise NotAllowedError("may not be mounted here", subject="binfmt_misc", hint=hint)
    if number in (errno.ENODEV, errno.ENOENT):
        hint = "sudo modprobe binfmt_misc; or a kernel with CONFIG_BINFMT_MISC"
        raise HostError("this kernel does not have it", subject="binfmt_misc", hint=hint)
    raise HostError(f"cannot be mounted: {os.strerror(number)}", subject="binfmt_misc")


def add_entry(root: Path, name: str, magic: Magic, interpreter: Path) -> int:
    """Register `interpreter` for files with `magic`; it comes before every older registration.

    Returns:
        When it was made, in nanoseconds since 1970.

    Raises:
        HostError: the kernel refuses it.
        NotAllowedError: we may not.
    """
    _write(root / "register", registration_line(name, magic, interpreter), name)
    return (root / name).stat().st_mtime_ns


def remove_entry(root: Path, name: str) -> None:
    """Take a registration away; one that is gone already is no error.  Raises what `add_entry` raises."""
    if (root / name).exists():
        _write(root / name, b"-1", name)


def switch_on(root: Path) -> None:
    """Let the kernel mind its registrations at all.  Raises what `add_entry` raises."""
    _write(root / "status", b"1", "binfmt_misc")


def registration_line(name: str, magic: Magic, interpreter: Path) -> bytes:
    """What is written to `register`: fields between colons, each byte of the magic as `\\xHH`."""

    def escaped(data: bytes) -> str:
        return "".join(f"\\x{byte:02x}" for byte in data)

    offset = str(magic.offset) if magic.offset else ""
    line = f":{name}:M:{offset}:{escaped(magic.magic)}:{escaped(magic.mask)}:{interpreter}:{FLAGS}"
    return os.fsencode(line)


def _write(file: Path, text: bytes, subject: str) -> None:
    """The kernel takes one write as one order."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text)
        finally:
            os.close(descriptor)
    except PermissionError as exc:
        raise NotAllowedError("may not be written", subject=str(file)) from exc
    except OSError as exc:
        raise HostError(f"the kernel refused it: {exc.strerror}", subject=subject) from exc
