"""How much memory the host has left, and whether its programs wait for it.

Sources: proc(5), /proc/meminfo; the kernel's Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_AVG10 = re.compile(r"^some avg10=(\d+\.\d+) ", re.MULTILINE)
_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Of the host as a whole."""

    total: int
    """Bytes; 0 when the host does not say."""
    available: int
    """Bytes that programs can have before anything is swapped; 0 when the host does not say."""
    pressure: float | None
    """Percent of the last ten seconds in which some program waited for memory; None when the kernel does not measure that."""


def read_host_memory(proc: Path = Path("/proc")) -> HostMemory:
    """What the kernel says now."""
    sizes = parse_meminfo(_read(proc / "meminfo"))
    pressure = parse_pressure(_read(proc / "pressure" / "memory"))
    return HostMemory(total=sizes.get("MemTotal", 0), available=sizes.get("MemAvailable", 0), pressure=pressure)


def parse_meminfo(text: str) -> dict[str, int]:
    """The sizes in /proc/meminfo, in bytes."""
    return {name: int(size) * _KIB for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}


def parse_pressure(text: str) -> float | None:
    """`some avg10` of /proc/pressure/memory."""
    found = _AVG10.search(text)
    return float(found[1]) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not there, or there but turned off (psi=0)
        return ""
