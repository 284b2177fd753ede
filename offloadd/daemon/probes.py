"""What remote hosts, and guests that others have made, said of themselves lately.  Who asks often does not log in often."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from offloadd.bridge import Bridge
from offloadd.daemon.machines import RunningMachine
from offloadd.errors import OffloadError, SshError
from offloadd.guest.ssh import open_remote, open_ssh
from offloadd.model.machine import SshMachine
from offloadd.model.quantity import format_duration
from offloadd.place.plain_probe import probe_plain
from offloadd.place.probe import Probe, probe_ssh

MAX_AGE_S = 30.0
"""After which a host is asked again."""
LIMIT_S = 10.0
"""For a login and a probe, when a build waits for its route."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    who: object
    """The machine as it was declared then, as another address or key is another host; or the instance."""
    at: float
    answer: Probe | OffloadError


class Probes:
    """The last probe of each."""

    def __init__(self, bridge: Bridge, failed: Callable[[str, OffloadError], None]) -> None:
        """`failed` is told of each host that was asked and did not answer."""
        self._bridge = bridge
        self._failed = failed
        self._known: dict[str, _Known] = {}
        self._asking: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    def known(self, machine: SshMachine) -> Probe | OffloadError | None:
        """What it said last, or why it did not; None when it was not asked within the last half minute."""
        return self._find(machine.name, machine)

    def forget(self, name: str) -> None:
        """Ask again next time."""
        self._known.pop(name, None)

    async def ask(self, machine: SshMachine) -> Probe | OffloadError:
        """What it says now or has said lately, or why it does not; in bounded time, and once for all who ask at a time."""

        async def look() -> Probe:
            async with open_remote(self._bridge, machine) as guest:
                return await probe_ssh(guest, machine.name)

        answer, is_new = await self._ask(machine.name, machine, look)
        if is_new and isinstance(answer, OffloadError):
            self._failed(machine.name, answer)
        return answer

    async def ask_guest(self, running: RunningMachine) -> Probe | OffloadError:
        """The same of a machine that runs without our agent.  Silence is not counted: builds may get guests of their own."""
        instance, secrets = running.instance, running.secrets
        assert instance is not None
        assert secrets is not None

        async def look() -> Probe:
            async with open_ssh(self._bridge, instance.ssh_port, secrets) as guest:
                return await probe_plain(guest, running.name, instance.record.clock)

        answer, _ = await self._ask(running.name, instance, look)
        return answer

    async def _ask(self, name: str, who: object, look: Callable[[], Awaitable[Probe]]) -> tuple[Probe | OffloadError, bool]:
        """What it says, and whether it was asked for that."""
        async with self._asking[name]:
            if (known := self._find(name, who)) is not None:
                return known, False
            answer: Probe | OffloadError = SshError(f"does not answer within {format_duration(LIMIT_S)}", subject=name)
            with trio.move_on_after(LIMIT_S):
                try:
                    answer = await look()
                except OffloadError as exc:
                    answer = exc
            self._known[name] = _Known(who=who, at=time.monotonic(), answer=answer)
            return answer, True

    def _find(self, name: str, who: object) -> Probe | OffloadError | None:
        known = self._known.get(name)
        if known is None or known.who != who or time.monotonic() - known.at > MAX_AGE_S:
            return None
        return known.answer
