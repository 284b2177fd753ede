"""A machine's task (`Machines._serve`) with a real agent, whose connections break, behind an instance that is a stand-in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from offloadd.daemon.guests import Guests
from offloadd.daemon.machines import Machines, RunningMachine
from offloadd.daemon.workshop import Workshop
from offloadd.errors import BootError, OffloadError
from offloadd.model.state import MachineState
from offloadd.store.database import Database, open_database
from offloadd.vm.instance import Instance
from offloadd.vm.outcome import Outcome

from .real_agent import RealAgent, open_real_agent


class StandIn:
    """What `_serve` and `open_guest` use of an instance; its guest is a process of this host."""

    name = "vm"

    def __init__(self, socket: Path) -> None:
        plan = SimpleNamespace(machine="vm", instance="vm", boot_timeout_s=20.0)
        self.files = SimpleNamespace(agent=socket)
        self.record = SimpleNamespace(plan=plan, ports={})
        self.outcome: Outcome | None = None
        self._ended = trio.Event()

    async def wait_ended(self) -> Outcome:
        await self._ended.wait()
        assert self.outcome is not None
        return self.outcome

    def end(self, state: MachineState, reason: str) -> None:
        self.outcome = Outcome(state=state, reason=reason, exit_status=0, stderr="", console="")
        self._ended.set()

    def console_tail(self, lines: int = 20) -> str:
        return "the last line"


class Served:
    """One machine that is served, and its guest."""

    def __init__(self, guest: RealAgent, machines: Machines, database: Database) -> None:
        self.guest = guest
        self.machines = machines
        self.database = database
        self.stand_in = StandIn(guest.path)
        self.running = RunningMachine("vm", None)
        self.running.instance = cast(Instance, self.stand_in)
        self.done = trio.Event()
        self.error: OffloadError | None = None

    async def serve(self) -> None:
        try:
            # Not as a fresh one, which would be made another machine: that would be this host.
            await self.machines.serve(self.running, cast(Instance, self.stand_in), fresh=False)
        except OffloadError as exc:
            self.error = exc
        self.done.set()

    async def ready(self) -> None:
        with trio.fail_after(10):
            while self.running.guest is None:
                await self.running.changed.park()

    async def not_ready(self) -> None:
        with trio.fail_after(10):
            while self.running.guest is not None:
                await trio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.daemon.machines.LOST_S", 0.2)


@pytest.fixture
async def served(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Served]:
    with open_database(tmp_path / "offload.sqlite") as database:
        database.move_machine("vm", MachineState.STARTING)
        workshop = cast(Workshop, SimpleNamespace(database=database))
        async with open_real_agent() as guest, trio.open_nursery() as inner:
            made = Served(guest, Machines(workshop, cast(Guests, None), nursery), database)
            inner.start_soon(made.serve)
            await made.ready()
            yield made
            inner.cancel_scope.cancel()


async def test_a_lost_connection_is_made_again(served: Served) -> None:
    first = served.running.guest
    assert first is not None
    assert await first.run("echo", "hello") == (0, b"hello\n")
    served.guest.kill()
    served.guest.start_again()
    await served.not_ready()
    # Meanwhile nobody gets the machine, and it is no less the user's.
    assert served.machines.find("vm") is None
    assert served.database.machine("vm").state is MachineState.RUNNING
    assert served.running.was_ready
    await served.ready()
    second = served.running.guest
    assert second is not None
    assert second is not first
    assert await second.run("echo", "again") == (0, b"again\n")
    served.stand_in.end(MachineState.STOPPED, "stopped by us")
    with trio.fail_after(10):
        await served.done.wait()
    assert served.error is None


@pytest.mark.parametrize("later_s", [0.0, 0.3], ids=["at once", "while it is connected again"])
async def test_a_connection_that_breaks_because_the_guest_powers_off(served: Served, later_s: float) -> None:
    served.guest.end()
    await served.not_ready()
    await trio.sleep(later_s)
    served.stand_in.end(MachineState.STOPPED_BY_GUEST, "shut down from inside the guest")
    with trio.fail_after(10):
        await served.done.wait()
    # The instance's own end is what is told, not a connection that cannot be made.
    assert served.error is None
    assert served.running.guest is None


async def test_an_agent_that_does_not_come_again(served: Served) -> None:
    served.stand_in.record.plan.boot_timeout_s = 1.0
    served.guest.kill()
    served.guest.disconnect()
    with trio.fail_after(10):
        await served.done.wait()
    assert isinstance(served.error, BootError)
    assert "its agent gave no hello" in served.error.what
    assert served.running.guest is None


async def test_a_machine_that_ends_while_it_is_used(served: Served) -> None:
    served.stand_in.end(MachineState.CRASHED, "QEMU ended by itself")
    with trio.fail_after(10):
        await served.done.wait()
    assert served.error is None
    assert served.running.guest is None
