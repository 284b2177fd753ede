"""A build on a remote host over SSH.

Nothing is installed there: the build service goes over the channel in front of its frames, as a zip that the remote host keeps
in memory.  The host must have Python and bubblewrap, and the build uses what else it has: there is no environment.  What a
recipe's `packages` ask for counts as there when the machine names it among its `features`.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache, partial

from offloadd.bridge import Bridge
from offloadd.builder.run import run_build
from offloadd.errors import SshError
from offloadd.guest.ssh import Guest, GuestProcess, open_remote
from offloadd.model.machine import SshMachine
from offloadd.paths import shipped
from offloadd.place.place import Place
from offloadd.place.probe import Probe, far_side_command, far_side_program, probe_ssh


class RemoteService:
    """The build service, run by a host that has none."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    @asynccontextmanager
    async def open_process(self) -> AsyncIterator[GuestProcess]:
        """Start it; leaving the block closes its channel, and with that ends the build.

        Raises:
            SshError: the connection is gone.
        """
        service = pack_service()
        async with self._guest.open_process(far_side_command("serve", str(len(service)))) as process:
            # One that has ended already has said why, which is read next.
            with suppress(SshError):
                await process.send(far_side_program() + service)
            yield process


@cache
def pack_service() -> bytes:
    """The build service as a zip; always the same bytes for the same files."""
    packed = io.BytesIO()
    folder = shipped() / "images/guest/build_service"
    # Not compressed: the other side's Python may have no zlib.
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.glob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"build_service/{path.name}"), path.read_bytes())
    return packed.getvalue()


@asynccontextmanager
async def open_remote_place(machine: SshMachine, bridge: Bridge) -> AsyncIterator[Place]:
    """A place on the remote host for one build, at the host's own date.

    Raises:
        SshError: it cannot be reached, or lacks something.
        ProtocolError: it does not say what it has.
    """
    async with open_remote(bridge, machine) as guest:
        probe = await probe_ssh(guest, machine.name)
        if probe.fault:
            raise SshError(probe.fault, subject=machine.name, hint=f"offload machine test {machine.name}")
        yield Place(run=partial(run_build, RemoteService(guest)), clock=time.time, facts=_facts(machine, probe))


def _facts(machine: SshMachine, probe: Probe) -> dict[str, object]:
    return {
        "host": machine.host,
        "cores": probe.cores,
        "machine_type": probe.machine,
        "clock_offset_s": probe.clock_offset_s,
        "python": probe.python,
    }
