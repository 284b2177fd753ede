"""QMP, through qemu.qmp, which is used in this file alone."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from qemu.qmp import ExecuteError, QMPClient, Runstate
from qemu.qmp.message import Message

from offloadd.bridge import Bridge
from offloadd.errors import MachineLostError

# The library logs every lost connection as an error; ours are reported by meaning.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


# A guest can cause others at will, for instance by setting its clock: they are not kept.
_KEPT_EVENTS = ("SHUTDOWN", "POWERDOWN", "GUEST_PANICKED")
_MAX_EVENTS = 100
"""Kept of these; an honest QEMU sends one or two."""
LAST_WORDS_S = 10.0
"""For what a QEMU that has ended has said to be read: it is here already."""
ANSWER_S = 60.0
"""For QEMU to answer a command, which takes it milliseconds."""


@contextmanager
def _mapped(what: str, instance: str) -> Iterator[None]:
    """Whatever goes wrong in the block is a MachineLostError.

    Not only the library's own errors: a guest that has broken out speaks for its QEMU, and an answer of another shape, or a
    line that is too long, too deep or no text, comes out as any exception.  That must end no more than this machine.
    """
    try:
        yield
    except Exception as exc:
        raise MachineLostError(what, subject=instance) from exc


class Qmp:
    """The monitor of one QEMU.  Made by `open_qmp` alone."""

    def __init__(self, bridge: Bridge, client: QMPClient, instance: str) -> None:
        self._bridge = bridge
        self._client = client
        self.instance = instance
        """What errors call it."""
        self._handing = trio.Lock()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command; keyword `node_name` becomes the argument `node-name`.

        Raises:
            MachineLostError: QEMU refused it or went away.
        """
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        with _mapped(f"QEMU went away during {command}", self.instance), trio.fail_after(ANSWER_S):
            try:
                return await self._bridge.call(self._client.execute, command, given or None)
            except ExecuteError as exc:
                refusal = f"QEMU refused {command}: {exc}"
        raise MachineLostError(refusal, subject=self.instance)

    async def answers(self) -> bool:
        """Whether QEMU is still there."""
        try:
            await self.execute("query-name")
        except MachineLostError:
            return False
        return True

    async def human(self, command: str) -> str:
        """Run a command of the human monitor, for what QMP does not have."""
        return str(await self.execute("human-monitor-command", command_line=command))

    async def take_last_events(self) -> list[Message]:
        """The events of `_KEPT_EVENTS` of a QEMU that has ended, oldest first: all that it has said is read before."""

        async def read_out() -> None:
            while self._client.runstate is Runstate.RUNNING:
                await self._client.runstate_changed()

        with trio.move_on_after(LAST_WORDS_S):
            await self._bridge.call(read_out)
        return await self._bridge.run_sync(self._client.events.clear)

    @asynccontextmanager
    async def handed_over(self, fd: int) -> AsyncIterator[str]:
        """Give QEMU a descriptor of ours; the block gets the name under which it can be opened there, for as long as it lasts.

        What was opened stays open.
        Raises:
            MachineLostError: QEMU refused it or went away.
        """

        async def send() -> int:
            self._client.send_fd_scm(fd)
            answer = await self._client.execute("add-fd")
            return int(answer["fdset-id"])  # type: ignore[index]

        with _mapped("QEMU does not take a file", self.instance), trio.fail_after(ANSWER_S):
            # QEMU holds one descriptor for the next command that wants one: two at a time would be mistaken for each other.
            async with self._handing:
                number = await self._bridge.call(send)
        try:
            yield f"/dev/fdset/{number}"
        finally:
            # QEMU keeps its own copy otherwise, until the monitor's connection ends.
            with trio.move_on_after(5, shield=True), suppress(MachineLostError):
                await self.execute("remove-fd", fdset_id=number)

    async def give(self, fd: int, name: str) -> None:
        """Give QEMU a descriptor of ours for good, under a name that `migrate` and `migrate-incoming` know as `fd:NAME`.

        Raises:
            MachineLostError: QEMU refused it or went away.
        """

        async def send() -> None:
            self._client.send_fd_scm(fd)
            await self._client.execute("getfd", {"fdname": name})

        with _mapped("QEMU does not take a file", self.instance), trio.fail_after(ANSWER_S):
            async with self._handing:
                await self._bridge.call(send)

    async def wait_disk_full(self) -> None:
        """Wait until QEMU has paused the guest because the host has no room for what it writes.

        Raises:
            MachineLostError: QEMU went away.
        """

        async def wait() -> None:
            with self._client.listener("BLOCK_IO_ERROR") as errors:
                # An adopted one may have been paused while nobody listened; QEMU's default is to pause for a full disk alone.
                status = await self._client.execute("query-status")
                if isinstance(status, dict) and status.get("status") == "io-error":
                    return
                async for event in errors:
                    data = event["data"]
                    if isinstance(data, dict) and data.get("nospace") and data.get("action") == "stop":
                        return

        with _mapped("QEMU went away", self.instance):
            await self._bridge.call(wait)


@asynccontextmanager
async def open_qmp(bridge: Bridge, socket: Path, instance: str) -> AsyncIterator[Qmp]:
    """Connect to the monitor at `socket`.

    Raises:
        MachineLostError: nobody answers there.
    """
    client = QMPClient(instance)
    client.events.names = set(_KEPT_EVENTS)
    client.events.event_filter = lambda _: len(client.events.history) < _MAX_EVENTS
    with _mapped("QEMU's monitor does not answer", instance):
        await bridge.call(client.connect, str(socket))
    try:
        yield Qmp(bridge, client, instance)
    finally:
        with trio.move_on_after(5, shield=True):
            with suppress(Exception):  # QEMU was there first; or what it said last was nonsense, which is raised here again
                await bridge.call(client.disconnect)
