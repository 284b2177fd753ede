"""The source of a build as the guest gets it: what the user sent, fetched sources beside it, nothing newer than its clock."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

from offloadd.builder.source import clamp_tar


def prepare_source(sent: Path, fetched: Sequence[Path], target: Path, newest: int) -> None:
    """Write the tar `target`.  Blocks: call it in a thread.

    Args:
        sent: the tar that came with the request; not trusted.
        fetched: files that are put into the build directory under their own names; they replace files of the same name.
        newest: seconds since 1970; no file is newer.
    Raises:
        UsageError: what was sent is no tar that can be built from.
    """
    with sent.open("rb") as src, target.open("wb") as dst:
        # The guest does not unpack a file over another.
        clamp_tar(src, dst, newest, leave_out={path.name for path in fetched})
    if not fetched:
        return
    with tarfile.open(target, "a", format=tarfile.PAX_FORMAT) as tar:
        for path in fetched:
            info = tarfile.TarInfo(path.name)
            info.size, info.mode, info.mtime = path.stat().st_size, 0o644, newest
            with path.open("rb") as file:
                tar.addfile(info, file)
