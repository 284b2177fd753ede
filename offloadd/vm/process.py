"""The process of one QEMU, ours or found again.

QEMU outlives the daemon on purpose, so both ways lead to the same handle: a pidfd, which says when the process has ended and
cannot be mistaken for another process that got the same number.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from offloadd.errors import HostError


def start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since the host's boot (proc(5), field 22 of stat); None when there is none.

    Together with the number it names one process for as long as the host runs.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rsplit(")", 1)[1].split()
    return None if fields[0] in "ZX" else int(fields[19])


class QemuProcess:
    """Made by `start_process` or `find_process`; given back with `end`."""

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self._popen = popen
        # In this order: were it another process by now, its ticks would be others too.
        self._pidfd = os.pidfd_open(pid)
        self.started = start_ticks(pid)

    async def wait_ended(self) -> int | None:
        """Wait for the end; the exit status, or None when it was not our child."""
        if self._pidfd >= 0:
            await trio.lowlevel.wait_readable(self._pidfd)
        return self._popen.wait() if self._popen else None

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has just ended, which is what we want
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self, limit_s: float) -> None:
        """Kill it if it still runs, wait until it is gone (at most `limit_s`), and close the handle; nothing interrupts."""
        self.kill()
        with trio.move_on_after(limit_s, shield=True):
            await self.wait_ended()
        self.close()

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def start_process(
    argv: Sequence[str], log: Path, pass_fds: Sequence[int], uid: int | None = None, groups: Sequence[int] = ()
) -> QemuProcess:
    """Start QEMU in a session of its own, standard output and error to `log`.

    Args:
        uid: the user, and the group of the same number, that it runs as; None for our own.
        groups: its further groups; only with `uid`.
    Raises:
        HostError: it cannot be started.
    """
    try:
        with log.open("ab") as stderr:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                cwd="/",
                start_new_session=True,
                pass_fds=pass_fds,
                umask=0o177,
                user=uid,
                group=uid,
                extra_groups=None if uid is None else groups,
            )
    except OSError as exc:
        raise HostError(f"cannot start {argv[0]}: {exc.strerror}", hint="offload doctor") from exc
    try:
        return QemuProcess(popen.pid, popen)
    except OSError as exc:  # we have no descriptor left: nobody would ever end it
        popen.kill()
        popen.wait()
        raise HostError(f"cannot watch {argv[0]}: {exc.strerror}") from exc


def find_process(pid: int, started: int) -> QemuProcess | None:
    """The process that an earlier daemon started, if it is still that one."""
    try:
        process = QemuProcess(pid, None)
    except OSError:
        return None
    if process.started != started:
        process.close()
        return None
    return process
