"""The host's side of forwarded ports: free before the start, known after it."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from pathlib import Path

from offloadd.errors import PortTakenError
from offloadd.vm.record import InstanceRecord

# A line of HMP's `info usernet`: protocol and state, file descriptor, source address and port, destination address and port.
_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+(?P<address>\S+)\s+(?P<host>\d+)\s+\S+\s+(?P<guest>\d+)")

# Ports from here on need no privilege (Linux: Documentation/networking/ip-sysctl.rst).
_FIRST_FREE = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def parse_usernet(text: str) -> dict[int, int]:
    """Guest port -> host port, from `info usernet`."""
    return {int(match["guest"]): int(match["host"]) for match in _FORWARD.finditer(text)}


def check_ports_free(instance: str, ports: Iterable[int], running: Iterable[InstanceRecord]) -> None:
    """Raise `PortTakenError`, naming the owner, when a host port is in use on 127.0.0.1."""
    owners = {host: record.plan.instance for record in running for host in record.ports.values()}
    first = int(_FIRST_FREE.read_text())
    for port in ports:
        if port < first:
            # QEMU has no privilege that would let it have one, also when we are root.
            hint = f"choose a port above {first - 1} in port-forwardings"
            raise PortTakenError(f"port {port} is for privileged programs only", subject=instance, hint=hint)
        with socket.socket() as probe:
            # As QEMU does it: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as exc:
                raise _taken(instance, port, owners.get(port)) from exc


def _taken(instance: str, port: int, owner: str | None) -> PortTakenError:
    if owner is not None:
        return PortTakenError(f"port {port} is taken by our machine {owner}", subject=instance, hint=f"offload vm stop {owner}")
    who = _foreign_owner(port)
    return PortTakenError(
        f"port {port} on 127.0.0.1 is taken{f' by {who}' if who else ''}",
        subject=instance,
        hint="end that program, or choose another port in port-forwardings",
    )


def _foreign_owner(port: int) -> str:
    """`name (pid N)` of the process that listens on the port; empty when this user may not see it (proc(5), /proc/net/tcp)."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        # A host without IPv6 has no second table.
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()) in inodes:
                process = link.parent.parent
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return ""
