"""The directory that gets what a build gave: its outputs, with `build.json` beside them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from offloadd.errors import HostError, UsageError

if TYPE_CHECKING:
    from offloadd.client import Client

RECORD = "build.json"
LOG = "build.log"
DEFAULT = "offload-out"
FAILED = "failed"
_MAX_RECORD_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was written."""

    directory: Path
    files: int = 0
    size: int = 0
    """Bytes."""
    left_out: tuple[str, ...] = ()


def default_out(name: str) -> Path:
    """`offload-out/NAME` in the current directory, for a user who names no other place.

    Raises:
        UsageError: a link is there.  It may have come with the source, and lead anywhere.
    """
    out = Path(DEFAULT) / name
    for path in (out.parent, out):
        if path.is_symlink():
            hint = "remove it, or choose a directory with --out"
            raise UsageError("is a link, which could lead the result anywhere", subject=str(path), hint=hint)
    return out


def check_out(out: Path, source: Path) -> Path:
    """Where the result goes, as an absolute path without links; refused before the build rather than after it.

    Raises:
        UsageError: something is there that we have not made, or would go with it.
    """
    target = Path(os.path.realpath(out))
    kept_ones = {"the source": source, "the current directory": Path.cwd().resolve(), "your home": Path.home().resolve()}
    for what, kept in kept_ones.items():
        if kept.is_relative_to(target):
            raise UsageError(f"--out would replace {what}", subject=str(out), hint="choose a directory of its own")
    if target.is_dir():
        try:
            inside = sorted(path.name for path in target.iterdir())
        except OSError as exc:
            raise UsageError(f"--out cannot be read: {exc.strerror}", subject=str(out)) from exc
        if inside and not _is_ours(target / RECORD):
            hint = "choose another directory, or remove it"
            what = f"--out is not empty, and offload has not made it (it holds {inside[0]})"
            raise UsageError(what, subject=str(out), hint=hint)
    elif os.path.lexists(target):
        raise UsageError("--out is not a directory", subject=str(out))
    # What a build gave takes its place by a rename beside it.
    nearest = next(folder for folder in target.parents if os.path.lexists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--out cannot be made in {nearest}", subject=str(out), hint="choose a directory of yours")
    return target


def _is_ours(record: Path) -> bool:
    try:
        # What came with a source may be a fifo, or a link to a device that never ends.
        if not stat.S_ISREG(record.lstat().st_mode) or record.lstat().st_size > _MAX_RECORD_BYTES:
            return False
        found = json.loads(record.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"build", "state"} <= found.keys()


def keep_result(
    client: Client, target: Path, build: str, result: Mapping[str, Any], log: BinaryIO, *, outputs: str | None
) -> Result:
    """Fetch the outputs of `build` and put them, the log and the record at `target`, all at once.

    Args:
        log: read from its beginning.
        outputs: the directory in `target` for the outputs (empty: `target` itself), None when they are not wanted.
    Raises:
        HostError: it cannot be written.
        ProtocolError: the guest's outputs are refused.
    """
    from offloadd.builder.outputs import unpack_outputs

    with _replacing(target) as new:
        tar = new / f".outputs-{secrets.token_hex(4)}.tar"
        files, size, left_out = 0, 0, tuple[str, ...]()
        if outputs is not None and client.fetch_outputs(build, tar):
            unpacked = unpack_outputs(tar, new / outputs)
            files, size, left_out = unpacked.files, unpacked.size, unpacked.left_out
            tar.unlink()
        if not os.path.lexists(new / LOG):  # an output of that name is what the user asked for
            with (new / LOG).open("wb") as file:
                log.seek(0)
                shutil.copyfileobj(log, file)
        record = new / RECORD
        record.unlink(missing_ok=True)
        record.write_text(json.dumps(dict(result), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Result(directory=target, files=files, size=size, left_out=left_out)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that takes its place when the block ends well, and is gone when it does not."""
    mark = secrets.token_hex(4)
    new, old = (target.with_name(f".{target.name}.{mark}.{word}") for word in ("new", "old"))
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            yield new
            if target.exists():
                target.rename(old)
            new.rename(target)
        except OSError as exc:
            raise HostError(f"cannot write the result: {exc.strerror}", subject=str(exc.filename or target)) from exc
    finally:
        for rest in (new, old):
            _remove(rest)


def _remove(directory: Path) -> None:
    if not directory.exists():
        return
    for folder, names, _ in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)
