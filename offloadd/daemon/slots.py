"""The slots of all machines, and who waits for one.

Whoever is woken routes again: another machine may have become the better one.  Who came first is first.

A slot that is free wakes one waiter, as all of a thousand would route in vain: the first who waits for this machine, else the
first of all, who passes the word on to the next when he goes on waiting for another one.  So no slot stays free that somebody
could have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio


class Ticket:
    """A place in the order of those who wait for a slot.  Made by `Slots.ticket` alone."""

    def __init__(self) -> None:
        self.machine = ""
        """The one that it waits for; empty: for any to be tried again."""
        self.offers: set[str] = set()
        """Machines that may have a free slot, of which those behind it have not heard."""
        self._woken = trio.Event()

    def wake(self) -> None:
        self._woken.set()

    async def wait(self) -> None:
        await self._woken.wait()
        self._woken = trio.Event()


class Slots:
    """Slots taken and waiters, by machine."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._limits: dict[str, int] = {}
        """As they were when somebody asked last."""
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
            for machine in (ticket.machine, *ticket.offers):
                self._offer(machine, self._waiting)

    def may_take(self, ticket: Ticket, machine: str, limit: int) -> bool:
        """Whether the holder of `ticket` may take a slot of `machine` now; until then it waits for that one.

        Args:
            limit: the machine's slots.
        """
        self._turn_to(ticket, machine)
        self._limits[machine] = limit
        return self._taken[machine] < limit and next(t for t in self._waiting if t.machine == machine) is ticket

    async def wait(self, ticket: Ticket) -> None:
        """Wait until it is worth routing again, after `may_take` has said no."""
        self._pass_on(ticket)
        await ticket.wait()

    async def wait_for_any(self, ticket: Ticket) -> None:
        """The same for who cannot go to any machine now."""
        self._turn_to(ticket, "")
        await self.wait(ticket)

    @contextmanager
    def take(self, machine: str) -> Iterator[None]:
        """Hold a slot; see `may_take`."""
        self._taken[machine] += 1
        try:
            yield
        finally:
            self._taken[machine] -= 1
            self._offer(machine, self._waiting)

    def _turn_to(self, ticket: Ticket, machine: str) -> None:
        before, ticket.machine = ticket.machine, machine
        if before != machine:
            # It may be for the slot that it turns from that it was woken; those before it have not heard of that.
            self._offer(before, self._waiting)

    def _pass_on(self, ticket: Ticket) -> None:
        """Tell those behind `ticket` what it was told and did not take."""
        offers, ticket.offers = ticket.offers - {ticket.machine}, set()
        if offers:
            line = list(self._waiting)
            behind = line[line.index(ticket) + 1 :]
            for machine in offers:
                self._offer(machine, behind)

    def _offer(self, machine: str, line: Iterable[Ticket]) -> None:
        """Wake one who may want a slot of `machine`: the first who waits for it, else the first of `line`."""
        if not machine or self._taken[machine] >= self._limits.get(machine, 1):
            return
        first = next((ticket for ticket in self._waiting if ticket.machine == machine), None)
        ticket = first or next(iter(line), None)
        if ticket is not None:
            ticket.offers.add(machine)
            ticket.wake()
