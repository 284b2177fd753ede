"""What a guest costs the host: the memory that comes back when it ends.

Source: proc(5), /proc/PID/smaps_rollup.
"""

from __future__ import annotations

from pathlib import Path

_KIB = 1024


def private_memory(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Bytes of memory that are this process's alone; None when it has ended, or is another user's and we are not root.  Blocks.

    What a clone has of its template is not counted.  `Private_Clean` and `Private_Dirty` would count it as long as there is
    only one clone: to the kernel a page is private when one process alone has it mapped, also a page of a file.
    """
    try:
        return parse_rollup((proc / str(pid) / "smaps_rollup").read_text())
    except (OSError, ValueError):
        return None


def parse_rollup(text: str) -> int:
    """`Anonymous` and `SwapPss`, in bytes.

    Raises:
        ValueError: they are not there.
    """
    sizes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in ("Anonymous", "SwapPss"):
            sizes[name] = int(value.split()[0]) * _KIB
    if "Anonymous" not in sizes:
        raise ValueError("no line `Anonymous`")
    return sum(sizes.values())
