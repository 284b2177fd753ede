"""Programs of the host: run in a process group of their own, their output streamed, and gone when the caller is cancelled.

Nothing here parses what a program prints; the caller's `on_line` does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from offloadd.errors import HostError, OffloadError, is_disk_full
from offloadd.nursery import open_narrow_nursery

Progress = Callable[[str, float | None], None]
"""Called with a phase in words and how much of it is done (0 to 1), None when that is not known."""

TERMINATE_LIMIT_S = 10.0
"""How long a group may take to end after SIGTERM before it gets SIGKILL."""
TAIL_LINES = 15
_ADMINISTRATORS = ("/usr/sbin", "/sbin")
_LINE_LIMIT = 64 * 1024
_DRAIN_LIMIT_S = 2.0
_FULL = re.compile(r"No space left on device|Disk quota exceeded|not enough free space|Could not allocate block", re.IGNORECASE)

PACKAGES = {
    "bwrap": "bubblewrap",
    "apt-cache": "apt",
    "apt-config": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "qemu-img": "qemu-utils",
    "resize2fs": "e2fsprogs",
    "rm": "coreutils",
    "sqfstar": "squashfs-tools",
    "tar": "tar",
    "unshare": "util-linux",
    "unsquashfs": "squashfs-tools",
    "zstd": "zstd",
}
"""Program -> the Debian package that has it."""


def silent(phase: str, fraction: float | None) -> None:
    """A `Progress` that tells nobody."""


async def run_program(
    argv: Sequence[str],
    *,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: Path | None = None,
    subject: str = "",
    error: type[OffloadError] = HostError,
    disk: Path | None = None,
    terminate_limit_s: float = TERMINATE_LIMIT_S,
    called: str = "",
) -> None:
    """Run `argv` to its end, standard output and error as one stream of lines for `on_line`.

    Args:
        on_line: what it raises ends the program, and leaves as it is.
        env: the whole environment; by default ours with LC_ALL=C.UTF-8, so that messages can be parsed.
        stdin: a file for its standard input; by default there is nothing to read.
        subject: what errors are about.
        disk: where the program writes, named when the disk is full.
        called: what errors call the program; by default the first word of `argv`, which may be but a wrapper.

    Raises:
        HostError: the program is missing, or the disk is full (then it is `error`).
        OffloadError: of class `error`, when it ends with another status than 0; `detail` has its last lines.

    When cancelled, the program's group gets SIGTERM, then SIGKILL after `terminate_limit_s`, and is gone on return.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        process, guard = await _start(argv, writer, env, cwd, stdin)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    # Read on while the group is being ended: a program that cleans up must not hang on a full pipe.
    reading = trio.CancelScope(shield=True)
    async with trio.lowlevel.FdStream(reader) as output, open_narrow_nursery() as nursery:
        nursery.start_soon(_read_lines, output, reading, tail, on_line)
        try:
            await _wait_exit(process.pid)
        finally:
            with trio.CancelScope(shield=True):
                await _end_group(process, guard, terminate_limit_s)
            # Somebody who left the group may still hold the pipe.
            reading.deadline = trio.current_time() + _DRAIN_LIMIT_S
    if process.returncode:
        raise _failure(called or argv[0], process.returncode, list(tail), subject=subject, error=error, disk=disk)


async def read_program(argv: Sequence[str], *, subject: str = "", error: type[OffloadError] = HostError) -> list[str]:
    """The lines that `argv` prints (both streams). Raises what `run_program` raises."""
    lines: list[str] = []
    await run_program(argv, on_line=lines.append, subject=subject, error=error)
    return lines


async def _start(
    argv: Sequence[str], output: int, env: Mapping[str, str] | None, cwd: Path | None, stdin: Path | None
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """The program, and its guard."""
    source = os.open(stdin or os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def start() -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            list(argv),
            stdin=source,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env) if env is not None else program_environment(),
            cwd=cwd,
            start_new_session=True,
        )
        try:
            return process, _guard(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise

    try:
        # A thread without `abandon_on_cancel` is waited for: a process that was started always has an owner.
        return await trio.to_thread.run_sync(start)
    except OSError as exc:
        raise _start_error(argv[0], exc) from exc
    finally:
        os.close(source)


def _guard(group: int) -> subprocess.Popen[bytes]:
    """A process that kills `group` when we are gone without having done so: it sees the end of a pipe that only we hold.

    mmdebstrap, for one, goes on when nobody reads what it says, and would write into what the next maker sweeps.
    """
    argv = ["/bin/sh", "-c", 'read -r _; kill -KILL "-$1"', "guard", str(group)]
    null = subprocess.DEVNULL
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=null, stderr=null, cwd="/", start_new_session=True)


def program_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment in a fixed language, with the administrator's folders in the path, and `extra`."""
    path = os.environ.get("PATH", "/usr/bin:/bin")
    folders = path.split(":") + [folder for folder in _ADMINISTRATORS if folder not in path.split(":")]
    return os.environ | {"LC_ALL": "C.UTF-8", "PATH": ":".join(folders)} | dict(extra or {})


def _start_error(program: str, exc: OSError) -> OffloadError:
    name = Path(program).name
    if isinstance(exc, FileNotFoundError):
        package = PACKAGES.get(name)
        hint = f"install the Debian package {package}: sudo apt-get install {package}" if package else "see `offload doctor`"
        return HostError("not installed", subject=name, hint=hint)
    return HostError(f"cannot be started: {exc.strerror}", subject=name)


def full_disk(subject: str, where: Path, error: type[OffloadError] = HostError) -> OffloadError:
    """The error that says which disk is full."""
    return error(f"the disk is full at {where}", subject=subject, hint="make room there, or try `offload image gc`")


def host_error(exc: OSError, subject: str, where: Path) -> OffloadError:
    """What the host refused while something was written at `where`."""
    if is_disk_full(exc):
        return full_disk(subject, where)
    return HostError(f"{exc.strerror or exc}{f': {exc.filename}' if exc.filename else ''}", subject=subject)


def _failure(
    program: str, status: int, tail: list[str], *, subject: str, error: type[OffloadError], disk: Path | None
) -> OffloadError:
    name = Path(program).name
    if any(_FULL.search(line) for line in tail):
        return full_disk(subject or name, disk or Path.cwd(), error)
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    return error(f"{name} {how}", subject=subject, detail="\n".join(tail))


async def _read_lines(
    output: trio.lowlevel.FdStream, scope: trio.CancelScope, tail: deque[str], on_line: Callable[[str], None] | None
) -> None:
    rest = b""
    with scope:
        async for chunk in output:
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LINE_LIMIT:
                lines, rest = [*lines, rest], b""
            for raw in lines:
                _tell(raw, tail, on_line)
    if rest:
        _tell(rest, tail, on_line)


def _tell(raw: bytes, tail: deque[str], on_line: Callable[[str], None] | None) -> None:
    line = raw.decode(errors="replace").rstrip("\r")
    tail.append(line)
    if on_line is not None:
        on_line(line)


async def _wait_exit(pid: int) -> None:
    """Wait without reaping: as long as the leader is a zombie, nobody else can get its group's number."""
    pidfd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        trio.lowlevel.notify_closing(pidfd)
        os.close(pidfd)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


async def _end_group(process: subprocess.Popen[bytes], guard: subprocess.Popen[bytes], limit_s: float) -> None:
    """Leave no process of the group behind, and reap its leader last: until then nobody else can get the group's number."""
    _signal_group(process, signal.SIGTERM)
    with trio.move_on_after(limit_s):
        await _wait_exit(process.pid)
    _signal_group(process, signal.SIGKILL)
    guard.kill()
    await _wait_exit(guard.pid)
    guard.communicate()
    await _wait_exit(process.pid)
    process.wait()
