"""What remote hosts said of themselves lately.  Who asks often does not log in often."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from offloadd.bridge import Bridge
from offloadd.errors import OffloadError, SshError
from offloadd.guest.ssh import open_remote
from offloadd.model.machine import SshMachine
from offloadd.model.quantity import format_duration
from offloadd.place.probe import Probe, probe_ssh

MAX_AGE_S = 30.0
"""After which a host is asked again."""
LIMIT_S = 10.0
"""For a login and a probe, when a build waits for its route."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    machine: SshMachine
    """As it was declared then: another address or key is another host."""
    at: float
    answer: Probe | OffloadError


class Probes:
    """The last probe of each remote host."""

    def __init__(self, bridge: Bridge, failed: Callable[[str, OffloadError], None]) -> None:
        """`failed` is told of each host that was asked and did not answer."""
        self._bridge = bridge
        self._failed = failed
        self._known: dict[str, _Known] = {}
        self._asking: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    def known(self, machine: SshMachine) -> Probe | OffloadError | None:
        """What it said last, or why it did not; None when it was not asked within the last half minute."""
        known = self._known.get(machine.name)
        if known is None or known.machine != machine or time.monotonic() - known.at > MAX_AGE_S:
            return None
        return known.answer

    def forget(self, name: str) -> None:
        """Ask again next time."""
        self._known.pop(name, None)

    async def ask(self, machine: SshMachine) -> Probe | OffloadError:
        """What it says now or has said lately, or why it does not; in bounded time, and once for all who ask at a time."""
        async with self._asking[machine.name]:
            answer = self.known(machine)
            if answer is None:
                answer = await self._ask(machine)
                if isinstance(answer, OffloadError):
                    self._failed(machine.name, answer)
                self._known[machine.name] = _Known(machine=machine, at=time.monotonic(), answer=answer)
            return answer

    async def _ask(self, machine: SshMachine) -> Probe | OffloadError:
        try:
            with trio.move_on_after(LIMIT_S):
                async with open_remote(self._bridge, machine) as guest:
                    return await probe_ssh(guest, machine.name)
        except OffloadError as exc:
            return exc
        return SshError(f"does not answer within {format_duration(LIMIT_S)}", subject=machine.name)
