"""Ask our daemon what becomes of a build: one HTTP request by hand, as loading a library for it takes longer than asking."""

from __future__ import annotations

import json
import os
import socket
import struct

from offloadd.directories import SOCKET, runtime_directory

PATIENCE_S = 10.0
"""After which a daemon that is silent counts as absent: the build daemon behind us does nothing else while it waits."""
MAX_ANSWER = 1 << 20

_PEER = struct.Struct("3i")  # struct ucred, unix(7): pid, uid, gid


class Unanswered(Exception):
    """Our daemon gives no answer; says why.  `absent`: as it does not run."""

    def __init__(self, why: str, *, absent: bool = False) -> None:
        super().__init__(why)
        self.absent = absent


class Answer:
    """What our daemon says.  After `accept` the machine is ours until `release`, or our own end."""

    def __init__(self, said: dict[str, object], connection: socket.socket) -> None:
        self.decision = str(said.get("decision"))
        """`accept`, `postpone` or `decline`."""
        self.why = str(said.get("why", ""))
        self.entry = str(said.get("entry", ""))
        """The machine as the build daemon's own program reads it."""
        self.ssh_config = str(said.get("ssh_config", ""))
        """What its ssh has to know besides."""
        self._connection = connection

    def release(self) -> None:
        self._connection.close()


def ask(daemon: str, system: str, features: list[str], *, local: bool, keys: dict[str, str]) -> Answer:
    """Ask for a machine.

    Args:
        daemon: `guix` or `nix`.
        local: whether the build daemon could build it itself now.
        keys: machine -> the copy of its client key that we can read.
    Raises:
        Unanswered: what is left is to do without.
    """
    request = {"daemon": daemon, "system": system, "features": features, "local": local, "keys": keys}
    try:
        path = os.environ.get("OFFLOAD_SOCKET") or f"{runtime_directory()}/{SOCKET}"
    except FileNotFoundError as exc:
        raise Unanswered(f"{exc.filename} {exc.strerror}", absent=True) from exc
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_S)
    try:
        connection.connect(path)
        _check_server(connection)
        body = json.dumps(request).encode()
        # HTTP/1.0: the answer's lines come as they are, without the lengths of chunks between them.
        head = f"POST /v1/offload HTTP/1.0\r\nHost: offloadd\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        return Answer(_read(connection), connection)
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        connection.close()
        raise Unanswered(f"{path}: {exc.strerror}", absent=True) from exc
    except (OSError, ValueError) as exc:
        connection.close()
        raise Unanswered(f"{path}: {exc}") from exc


def copied_keys(configuration: str) -> dict[str, str]:
    """The copies of client keys below a build daemon's configuration directory: machine -> file."""
    folder = f"{configuration}/offload/ssh"
    try:
        return {name: f"{folder}/{name}" for name in os.listdir(folder) if not name.startswith(".")}
    except OSError:
        return {}


def _check_server(connection: socket.socket) -> None:
    """Raise `ValueError` when somebody else serves there than root, we, or whom our environment names: we would log in where
    they say."""
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid not in (0, os.geteuid()) and str(uid) != os.environ.get("OFFLOAD_SOCKET_OWNER"):
        raise ValueError(f"is served by another user ({uid})")


def _read(connection: socket.socket) -> dict[str, object]:
    """The first line of the answer; the others never come while the connection is open."""
    answer = b""
    while True:
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.partition(b"\r\n")[0].split(b" ")
        if b"\n" in body:
            break
        piece = connection.recv(65536)
        if not piece:
            break
        answer += piece
        if len(answer) > MAX_ANSWER:
            raise ValueError("the answer is too long")
    if len(status) < 2 or status[1] != b"200":
        raise ValueError(f"answered {b' '.join(status[1:2]).decode(errors='replace') or 'nothing'}")
    said = json.loads(body.partition(b"\n")[0])
    if not isinstance(said, dict):
        raise ValueError("answered something else than an object")
    return said
