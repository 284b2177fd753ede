"""How fast this host's time stamp counter runs, which programs under TCG see as it is.

Linux measures it at boot against a timer.  On a host that is busy an emulated processor stands still in the middle of that, and
comes to a third of the truth: its clock then runs three times too fast, and that of each clone too.  So it is told.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import time

_SAMPLES = 50
_APART_S = 0.05
_READ = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret (Intel SDM, volume 2): nothing else on Linux tells this to users."""


@functools.cache
def host_tsc_khz() -> int | None:
    """Thousands of ticks in a second, to the nearest million; None where there is none that programs can read.

    Blocks for 50 ms the first time.
    """
    if os.uname().machine != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        # A host that gives nobody such memory has no TCG either.
        return None
    page.write(_READ)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    first_ns, first = _sample(read)
    time.sleep(_APART_S)
    last_ns, last = _sample(read)
    return round((last - first) * 1000 / (last_ns - first_ns)) * 1000


def _sample(read: ctypes._CFunctionType) -> tuple[int, int]:
    """The raw clock in nanoseconds and the counter at one moment: of several tries that in which least came between."""
    tries = []
    for _ in range(_SAMPLES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counter = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        tries.append((after - before, (before + after) // 2, counter))
    _, moment, counter = min(tries)
    return moment, counter
