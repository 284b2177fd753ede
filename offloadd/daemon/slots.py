"""The slots of all machines, and who waits for one.

Whoever is woken routes again: another machine may have become the better one.  Who came first is first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Ticket:
    """A place in the order of those who wait for a slot."""

    def __init__(self) -> None:
        self.machine = ""
        """The one that it waits for."""
        self._woken = trio.Event()

    def wake(self) -> None:
        self._woken.set()

    async def wait(self) -> None:
        """Wait until it is worth routing again."""
        await self._woken.wait()
        self._woken = trio.Event()


class Slots:
    """Slots taken and waiters, by machine."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._waiting: dict[Ticket, None] = {}
        """In the order in which they came."""

    def busy(self, machine: str) -> int:
        """Slots of that machine that are taken."""
        return self._taken[machine]

    def wake_all(self) -> None:
        """Something by which builds are routed has changed: a machine's mode, a file."""
        for ticket in self._waiting:
            ticket.wake()

    @contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Stand in line for the length of the block."""
        ticket = Ticket()
        self._waiting[ticket] = None
        try:
            yield ticket
        finally:
            del self._waiting[ticket]
            self._wake_next(ticket.machine)

    def may_take(self, ticket: Ticket, machine: str, limit: int) -> bool:
        """Whether the holder of `ticket` may take a slot of `machine` now; until then it waits for that one.

        Args:
            limit: the machine's slots.
        """
        ticket.machine = machine
        return self._taken[machine] < limit and next(t for t in self._waiting if t.machine == machine) is ticket

    @contextmanager
    def take(self, machine: str) -> Iterator[None]:
        """Hold a slot; see `may_take`."""
        self._taken[machine] += 1
        try:
            yield
        finally:
            self._taken[machine] -= 1
            self._wake_next(machine)

    def _wake_next(self, machine: str) -> None:
        """Only the first: all of a thousand would route in vain."""
        first = next((ticket for ticket in self._waiting if ticket.machine == machine), None)
        for ticket in (first, next(iter(self._waiting), None)):
            if ticket is not None:
                ticket.wake()
                return
