"""A program with a terminal of its own: it gets our keys and our screen, but not our terminal, into which it could type."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from offload_cli.console import raw_mode

_PIECE = 4096


def run_shell(argv: Sequence[str]) -> int:
    """Run a program on our standard streams to its end; its exit status."""
    sys.stdout.flush()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _run_plain(argv)
    child, terminal = pty.fork()
    if not child:
        try:
            os.execvp(argv[0], list(argv))  # noqa: S606 - a program and its arguments
        finally:
            os._exit(127)
    try:
        with raw_mode(sys.stdin.fileno()), _same_size(terminal):
            _copy(terminal)
    finally:
        # Its hang-up ends what is left.
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    return _status(os.waitstatus_to_exitcode(status))


def _run_plain(argv: Sequence[str]) -> int:
    with subprocess.Popen(argv) as process:
        try:
            return _status(process.wait())
        except BaseException:
            # Killed outright, it would leave what it has made.
            process.terminate()
            raise


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


@contextmanager
def _same_size(terminal: int) -> Iterator[None]:
    def take_over(*_: object) -> None:
        with suppress(OSError):
            size = fcntl.ioctl(sys.stdin.fileno(), termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)

    before = signal.signal(signal.SIGWINCH, take_over)
    take_over()
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


def _copy(terminal: int) -> None:
    """Copy both ways until the program's side is closed."""
    keys: int | None = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([terminal] if keys is None else [terminal, keys], [], [])
        if terminal in ready:
            try:
                said = os.read(terminal, _PIECE)
            except OSError:  # EIO: nobody has the other side open any more
                return
            if not said:
                return
            _write_all(sys.stdout.fileno(), said)
        if keys in ready and keys is not None:
            typed = os.read(keys, _PIECE)
            _write_all(terminal, typed or b"\x04")
            keys = keys if typed else None


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
