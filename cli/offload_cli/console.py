"""A terminal on a machine's console."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload_cli.terminal import clean, say
from offloadd.errors import DaemonError

LEAVE = b"\x1d"
"""Ctrl-]."""
_LAST_LINES = 20
_TAIL_BYTES = 16 * 1024
_PIECE = 4096


def run_console(path: Path, log: Path) -> None:
    """Join standard input and output to the console's socket, until the user leaves or the machine ends.

    Raises:
        DaemonError: nobody serves the socket.
    """
    with _connect(path) as console:
        sys.stderr.write(last_lines(log))
        source = sys.stdin.fileno() if sys.stdin.isatty() else None
        if source is None:
            _copy(console, None)
            return
        say("connected; Ctrl-] leaves the console")
        with raw_mode(source):
            left = _copy(console, source)
        say("left the console" if left else "\nthe console was closed")


def last_lines(log: Path) -> str:
    """What the console said lately."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = clean(file.read().decode(errors="replace")).replace("\r", "")
    except OSError:
        return ""
    return "".join(f"{line}\n" for line in text.splitlines()[-_LAST_LINES:])


@contextmanager
def _connect(path: Path) -> Iterator[socket.socket]:
    # Through the folder's descriptor: the address of a socket holds 107 bytes, and a path may be longer.
    try:
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            console = socket.socket(socket.AF_UNIX)
            console.connect(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
    except OSError as exc:
        what = f"cannot connect to the console: {exc.strerror}"
        raise DaemonError(what, subject=path.parent.name, hint="offload vm list") from exc
    with console:
        yield console


@contextmanager
def raw_mode(terminal: int) -> Iterator[None]:
    """Every key reaches whoever reads `terminal`, as it is typed."""
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        # What is typed but not read yet goes: a guest can make a terminal answer, and the user's shell must not get that.
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def _copy(console: socket.socket, source: int | None) -> bool:
    """Copy both ways; True when the user left, False when the console was closed."""
    sys.stderr.flush()
    watched = [console.fileno()] if source is None else [console.fileno(), source]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if console.fileno() in ready:
            piece = console.recv(_PIECE)
            if not piece:
                return False
            _write_all(sys.stdout.fileno(), piece)
        if source in ready:
            typed = os.read(sys.stdin.fileno(), _PIECE)
            before, leave, _ = typed.partition(LEAVE)
            console.sendall(before)
            if leave or not typed:
                return True


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
