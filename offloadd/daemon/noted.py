"""What a daemon keeps in mind on a disk that may be full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from offloadd.errors import HostError

log = structlog.get_logger()


@contextmanager
def noted(machine: str) -> Iterator[None]:
    """What cannot be noted of a machine in the block, as the disk is full, must not take builds and machines along."""
    try:
        yield
    except (HostError, OSError) as exc:
        log.error("not noted", machine=machine, error=str(exc))
