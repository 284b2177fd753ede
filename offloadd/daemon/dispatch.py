"""Which machine a build goes to: the survey of all machines, the router, slots, breakers and quirks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import structlog
import trio

from offloadd.daemon.noted import noted
from offloadd.daemon.slots import Slots
from offloadd.daemon.survey import Survey
from offloadd.daemon.workshop import Workshop
from offloadd.errors import (
    AgentError,
    BootError,
    MachineLostError,
    NotFoundError,
    OffloadError,
    PortTakenError,
    ProtocolError,
    SshError,
)
from offloadd.model.machine import Machine, SshMachine, VmMachine
from offloadd.model.system import nearest
from offloadd.route import Decision, Emulation, Needs, find_route

MACHINE_FAULTS = (BootError, SshError, AgentError, MachineLostError, ProtocolError, PortTakenError)
"""What counts against a machine: not the build's doing, and not the host's."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A machine with a slot for one build."""

    machine: Machine
    decision: Decision
    emulation: Emulation
    """How the machine runs the build's system type."""


class Dispatcher:
    """Hands out machines."""

    def __init__(self, shop: Workshop, survey: Survey, slots: Slots) -> None:
        self._shop = shop
        self._survey = survey
        self.slots = slots

    async def decide(self, needs: Needs, *, without: Collection[str] = ()) -> Decision:
        """The router's decision, from what is known now.

        Args:
            without: machines that have failed this build already.
        Raises:
            NotFoundError: the machine or kind that is asked for or preferred does not exist.
        """
        decision, _ = await self._decide(needs, without)
        return decision

    async def _decide(self, needs: Needs, without: Collection[str]) -> tuple[Decision, dict[str, Emulation]]:
        library = self._shop.library()
        if needs.machine:
            library.machine(needs.machine)
        kinds = {machine.kind for machine in library.machines.values()}
        for word in needs.prefer:
            if word not in kinds and word not in library.machines:
                known = [*library.machines, *kinds]
                raise NotFoundError(f"no machine or kind is called {word!r}", subject="--prefer", hint=nearest(word, known))

        def worth(machine: Machine) -> bool:
            """Only who could be chosen is asked: a host that is dead costs those builds alone that it would have taken."""
            if isinstance(machine, VmMachine) and machine.volatile and not needs.keep_machine:
                return False  # the build gets a guest of its own, of which nobody knows the load
            if needs.machine is not None:
                return machine.name == needs.machine
            wants_vm = needs.keep_machine or (needs.date, needs.cpu, needs.kernel) != (None, None, None)
            return needs.system in machine.systems and (not isinstance(machine, SshMachine) or not (needs.debian or wants_vm))

        facts = await self._survey.facts(library.machines, worth=worth)
        facts |= {name: replace(facts[name], fault="it has failed this build already") for name in without if name in facts}
        # While we looked others may have taken slots; from here to the slot nobody else can.
        stale = ((name, known, self.slots.busy(name)) for name, known in facts.items())
        facts |= {name: replace(known, busy=busy) for name, known, busy in stale if known.busy != busy}
        decision = find_route(needs, library.machines.values(), facts, time.time())
        return decision, {name: known.emulation for name, known in facts.items()}

    @asynccontextmanager
    async def take(
        self, needs: Needs, *, without: Collection[str], waiting: Callable[[str], None]
    ) -> AsyncIterator[Assignment]:
        """A slot of the best machine, for the length of the block.

        What goes wrong in the block is counted against the machine, or clears it.

        Args:
            waiting: is told what is waited for.
        Raises:
            NoMachineError: no machine can, or may any more.
        """
        with ExitStack() as held:
            with self.slots.ticket() as ticket:
                told = ""

                def tell(what: str) -> None:
                    nonlocal told
                    if told != what:
                        told = what
                        waiting(what)

                while True:
                    decision, emulations = await self._decide(needs, without)
                    if not decision.candidates and (retry_at := decision.retry_at) is not None:
                        # The build was taken when one of them could: that it is being left alone is no reason to fail.
                        tell("a machine that is left alone after failures")
                        with trio.move_on_after(max(retry_at - time.time(), 0.0)):
                            await self.slots.wait_for_any(ticket)
                        continue
                    machine = decision.best()
                    if self.slots.may_take(ticket, machine.name, machine.parallel_builds):
                        break
                    tell(f"a slot on {machine.name}")
                    await self.slots.wait(ticket)
                held.enter_context(self.slots.take(machine.name))
            try:
                yield Assignment(machine=machine, decision=decision, emulation=emulations[machine.name])
            except OffloadError as exc:
                with noted(machine.name):
                    self._note(machine.name, exc)
                raise
            with noted(machine.name):
                self._note(machine.name, None)

    def _note(self, machine: str, error: OffloadError | None) -> None:
        """Keep the machine's breaker."""
        database, now = self._shop.database, time.time()
        breaker = database.breaker(machine)
        if isinstance(error, MACHINE_FAULTS):
            breaker = breaker.after_failure(now)
            database.store_breaker(machine, breaker)
            log.warning("machine failed", machine=machine, failures=breaker.failures, error=str(error))
        elif breaker.failures and (error is None or not error.retryable):
            database.store_breaker(machine, breaker.after_success())
