"""Both ends of the greeting.

The client sends one line with a name, the server answers one line that greets it.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

_MAX_LINE_BYTES = 1024


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The settings of a server that shows `certificate` (PEM)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def client_context(authority: Path) -> ssl.SSLContext:
    """The settings of a client that trusts `authority` (PEM) and nobody else."""
    return ssl.create_default_context(cafile=str(authority))


def greet(connection: socket.socket, context: ssl.SSLContext) -> None:
    """Serve one client on `connection`."""
    with context.wrap_socket(connection, server_side=True) as tls:
        name = _read_line(tls)
        tls.sendall(f"Hello, {name}!\n".encode())


def ask(connection: socket.socket, context: ssl.SSLContext, *, server: str, name: str) -> str:
    """Send `name` to the server on `connection`, which must prove that it is called `server`; return its greeting."""
    with context.wrap_socket(connection, server_hostname=server) as tls:
        tls.sendall(f"{name}\n".encode())
        return _read_line(tls)


def _read_line(tls: ssl.SSLSocket) -> str:
    with tls.makefile("rb") as stream:
        return stream.readline(_MAX_LINE_BYTES).decode().rstrip("\n")
