"""The ports of childhurds are fixed by their id, and tests of several workers want them."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_childhurd_ports() -> Iterator[None]:
    """The ports of the ids none, 1 and 2 are the caller's for the length of the block."""
    with Path(tempfile.gettempdir(), f"offload-test-childhurd-{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
