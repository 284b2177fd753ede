"""What one build may take of this host: a build that starts processes without end must not keep others, and us, from theirs.

Memory has no limit here, but who is killed first when there is none left is the build (oom_score_adj, see its steps).
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ENOUGH = 1024
"""Processes and threads that a build gets also where half of what we have is less."""


def limit_processes(pid: int, root: Path = Path("/")) -> None:
    """Let the users of the build service `pid` have half of the processes and threads that we could have ourselves.

    The kernel counts by user (setrlimit(2), RLIMIT_NPROC) and lets the root of the host have any number: what it limits is the
    build's spare user, or our own user inside our builds.
    """
    most = min(_most(root))
    limit = max(most // 2, min(most, ENOUGH))
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_NPROC, (limit, limit))


def _most(root: Path) -> Iterator[int]:
    """Each number that limits ours: the kernel's for all, our own, those of our control groups (cgroups(7), pids)."""
    yield int((root / "proc/sys/kernel/threads-max").read_text()) // 2
    for own in resource.getrlimit(resource.RLIMIT_NPROC):
        if own != resource.RLIM_INFINITY:
            yield own
    lines = (root / "proc/self/cgroup").read_text().splitlines()
    group = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    top = root / "sys/fs/cgroup"
    for folder in (top / group, *(top / group).parents):
        if not folder.is_relative_to(top):
            return
        # `max`, and no such file: no limit here.
        with suppress(OSError, ValueError):
            yield int((folder / "pids.max").read_text())
