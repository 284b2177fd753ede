"""From a TCP port of the loopback to a Unix socket, for programs of our own user alone.

A port has no owner: whoever is logged in to this host can connect to it.  The kernel knows whose connection it is, and says so
in /proc/net/tcp; others are turned away.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from offloadd.errors import HostError

_LOOPBACK = "127.0.0.1"
_ESTABLISHED = "01"
_PIECE = 64 * 1024
_MAX_AT_ONCE = 16
_TABLE = Path("/proc/net/tcp")


def listen_local(port: int) -> socket.socket:
    """A socket that listens at 127.0.0.1:`port`; 0: at any.

    Raises:
        HostError: the port is taken, or not for us.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen(4)
    except OSError as exc:
        listener.close()
        raise HostError(f"cannot listen: {exc.strerror}", subject=f"{_LOOPBACK}:{port}", hint="take another port") from exc
    return listener


def serve(listener: socket.socket, target: Path, tell: Callable[[str], None]) -> None:
    """Join each connection of ours with one to the socket `target`, until interrupted or `listener` is closed.

    Args:
        tell: is told of those that are turned away.
    """
    room = threading.Semaphore(_MAX_AT_ONCE)
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        owner = owner_of(peer)
        if owner not in (0, os.geteuid()):
            tell(f"turned away a program of {'nobody known' if owner is None else f'user {owner}'}")
            peer.close()
        elif not room.acquire(blocking=False):
            tell(f"turned away a viewer: {_MAX_AT_ONCE} are there")
            peer.close()
        else:
            threading.Thread(target=_join, args=(peer, target, tell, room), daemon=True).start()


def owner_of(peer: socket.socket) -> int | None:
    """The user whose program is at the other end of a connection of the loopback; None when that cannot be told."""
    with suppress(OSError):
        return find_owner(_TABLE.read_text().splitlines()[1:], peer.getpeername(), peer.getsockname())
    return None


def find_owner(lines: Iterable[str], their: tuple[str, int], our: tuple[str, int]) -> int | None:
    """The owner in a line of /proc/net/tcp (proc_net_tcp(5)): of their end, whose other end is ours, and which is in use.

    What they have closed already belongs to nobody, which the kernel writes as user 0.
    """
    ends = [_hexadecimal(their), _hexadecimal(our), _ESTABLISHED]
    for line in lines:
        words = line.split()
        if words[1:4] == ends:
            return int(words[7])
    return None


def _hexadecimal(address: tuple[str, int]) -> str:
    """The kernel prints the address as a number of this processor's byte order."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"


def _join(peer: socket.socket, target: Path, tell: Callable[[str], None], room: threading.Semaphore) -> None:
    try:
        with peer, socket.socket(socket.AF_UNIX) as there:
            there.connect(str(target))
            back = threading.Thread(target=_copy, args=(there, peer), daemon=True)
            back.start()
            _copy(peer, there)
            back.join()
    except OSError as exc:
        tell(f"cannot connect to the screen: {exc.strerror}")
    finally:
        room.release()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Until the end of one of them, which is the end of both."""
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
