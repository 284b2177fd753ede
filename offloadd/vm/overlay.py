"""An empty qcow2 image: the volatile disk of a machine, above whatever its command line names as its backing.

Source: QEMU's docs/interop/qcow2.txt, version 3.  Written here, as to start `qemu-img` takes longer than all else that a
machine needs before its QEMU is started.
"""

from __future__ import annotations

import struct
from pathlib import Path

CLUSTER_BITS = 16
_CLUSTER = 1 << CLUSTER_BITS
_MAGIC = 0x514649FB
_REFCOUNT_ORDER = 4
"""Counts of 16 bits."""
_HEADER_BYTES = 104
_L2_ENTRIES = _CLUSTER // 8
MAX_SIZE = _L2_ENTRIES * _CLUSTER * (_CLUSTER // 8)
"""Bytes that one cluster of the first table reaches."""


def write_overlay(path: Path, size: int) -> None:
    """Make the new file `path`, an empty image of `size` bytes.

    Raises:
        ValueError: the size is no multiple of a sector, or too large.
        OSError: the file cannot be made.
    """
    if size % 512 or not 0 < size <= MAX_SIZE:
        raise ValueError(f"no disk has {size} bytes")
    tables = -(-size // (_CLUSTER * _L2_ENTRIES))
    # Clusters: this header, the table of counts, one block of counts, the first table of addresses (all of them holes).
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII",
        *(_MAGIC, 3, 0, 0, CLUSTER_BITS, size, 0, tables, 3 * _CLUSTER),
        *(_CLUSTER, 1, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER_BYTES),
    )
    with path.open("xb") as file:
        file.write(header)
        file.seek(_CLUSTER)
        file.write(struct.pack(">Q", 2 * _CLUSTER))
        file.seek(2 * _CLUSTER)
        file.write(struct.pack(">4H", 1, 1, 1, 1))
        file.truncate(4 * _CLUSTER)
