"""What the processor and the kernel of this host run by themselves."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

_NATIVE: dict[str, tuple[str, ...]] = {
    "x86_64": ("x86_64-linux", "i686-linux"),
    "i686": ("i686-linux",),
    "i586": ("i686-linux",),
    "aarch64": ("aarch64-linux",),
    "armv7l": ("armhf-linux",),
    # A 32-bit process on an ARMv8 processor: linux32(1).
    "armv8l": ("armhf-linux",),
    "riscv64": ("riscv64-linux",),
    "ppc64le": ("powerpc64le-linux",),
    "s390x": ("s390x-linux",),
    "loongarch64": ("loongarch64-linux",),
}
"""Linux's name of a machine (uname(2)) -> the system types that it runs, its own first."""

_PER_LINUX32 = 0x0008
"""linux/personality.h"""


@functools.cache
def native_systems() -> tuple[str, ...]:
    """The system types that run here without emulation, the host's own first; none on a machine that we do not know."""
    machine = os.uname().machine
    if machine == "mips64":
        return ("mips64el-linux",) if sys.byteorder == "little" else ()
    found = _NATIVE.get(machine, ())
    return (*found, "armhf-linux") if machine == "aarch64" and _runs_32_bit() else found


def systems_of(machine: str) -> tuple[str, ...]:
    """The system types that a processor runs which Linux calls `machine` (`uname -m`); none when we do not know it."""
    return _NATIVE.get(machine, ())


def _runs_32_bit() -> bool:
    """Many 64-bit ARM processors have no 32-bit mode; then Linux refuses the personality, as lscpu(1) knows, too."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = libc.personality(_PER_LINUX32)
    if before == -1:
        return False
    libc.personality(before)
    return True
