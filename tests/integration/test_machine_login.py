"""A machine's task (`Machines._serve`) with a real sshd, whose connections break, behind an instance that is a stand-in."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from offloadd.bridge import open_bridge
from offloadd.daemon.machines import Machines, RunningMachine
from offloadd.daemon.workshop import Workshop
from offloadd.errors import BootError, OffloadError
from offloadd.guest import ssh
from offloadd.guest.secret_root import SecretRoot, ensure_secret_root
from offloadd.model.state import MachineState
from offloadd.store.database import Database, open_database
from offloadd.vm.instance import Instance
from offloadd.vm.outcome import Outcome

from .test_ssh import ME, SSHD, Server, end_children, free_port, start_sshd, wait_for

pytestmark = pytest.mark.skipif(SSHD is None, reason="openssh-server is not installed")


class StandIn:
    """What `_serve` and `open_guest` use of an instance; its guest is the sshd of this host."""

    name = "vm"

    def __init__(self, port: int) -> None:
        plan = SimpleNamespace(machine="vm", instance="vm", boot_timeout_s=1.5)
        self.record = SimpleNamespace(plan=plan, ports={22: port})
        self.outcome: Outcome | None = None
        self._ended = trio.Event()

    def port(self, guest: int) -> int:
        return self.record.ports[guest]  # type: ignore[no-any-return]

    async def wait_ended(self) -> Outcome:
        await self._ended.wait()
        assert self.outcome is not None
        return self.outcome

    def end(self, state: MachineState, reason: str) -> None:
        self.outcome = Outcome(state=state, reason=reason, exit_status=0, stderr="", console="")
        self._ended.set()

    def console_tail(self) -> str:
        return "the last line"


class Served:
    """One machine that is served, and its sshd."""

    def __init__(self, server: Server, machines: Machines, database: Database, secrets: SecretRoot) -> None:
        self.server = server
        self.machines = machines
        self.database = database
        self.stand_in = StandIn(server.port)
        self.running = RunningMachine("vm", None)
        self.running.instance = cast(Instance, self.stand_in)
        self.running.secrets = secrets
        self.done = trio.Event()
        self.error: OffloadError | None = None

    async def serve(self) -> None:
        try:
            await self.machines._serve(self.running, adopted=True)
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

    def end_sshd(self) -> None:
        # Stopped first: between the two nobody logs in again.
        self.server.process.send_signal(signal.SIGSTOP)
        end_children(self.server.process.pid)
        self.server.process.kill()
        self.server.process.wait()

    def start_sshd(self) -> None:
        self.server.process = start_sshd(self.server.folder, self.server.secrets, self.server.port)
        wait_for(self.server.port)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ssh, "ACCOUNT", ME)
    monkeypatch.setattr("offloadd.daemon.machines.LOST_S", 0.2)
    return iter([None])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    secrets = ensure_secret_root("vm", tmp_path / "secrets")
    port = free_port()
    made = Server(secrets, port, start_sshd(tmp_path, secrets, port), tmp_path)
    wait_for(port)
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
async def served(server: Server, tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Served]:
    with open_database(tmp_path / "offload.sqlite") as database:
        database.move_machine("vm", MachineState.STARTING)
        async with open_bridge() as bridge:
            workshop = cast(Workshop, SimpleNamespace(bridge=bridge, database=database))
            made = Served(server, Machines(workshop, nursery), database, server.secrets)
            async with trio.open_nursery() as inner:
                inner.start_soon(made.serve)
                await made.ready()
                yield made
                inner.cancel_scope.cancel()


async def test_a_lost_connection_is_made_again(served: Served) -> None:
    first = served.running.guest
    assert first is not None
    assert await first.run("echo hello") == (0, b"hello\n")
    served.end_sshd()
    await served.not_ready()
    # Meanwhile nobody gets the machine, and it is no less the user's.
    assert served.machines.find("vm") is None
    assert served.database.machine("vm").state is MachineState.RUNNING
    assert served.running.was_ready
    served.start_sshd()
    await served.ready()
    second = served.running.guest
    assert second is not None
    assert second is not first
    assert await second.run("echo again") == (0, b"again\n")
    served.stand_in.end(MachineState.STOPPED, "stopped by us")
    with trio.fail_after(10):
        await served.done.wait()
    assert served.error is None


async def test_a_connection_that_breaks_because_the_guest_powers_off(served: Served) -> None:
    served.end_sshd()
    await served.not_ready()
    await trio.sleep(0.5)  # longer than the moment that an end gets to be known: it logs in again
    assert served.running.phase[0] == "logging in"
    served.stand_in.end(MachineState.STOPPED_BY_GUEST, "shut down from inside the guest")
    with trio.fail_after(10):
        await served.done.wait()
    # The instance's own end is what is told, not a boot that failed.
    assert served.error is None
    assert served.running.guest is None


async def test_a_guest_that_takes_no_login_again(served: Served) -> None:
    served.end_sshd()
    with trio.fail_after(10):
        await served.done.wait()
    assert isinstance(served.error, BootError)
    assert "sshd did not take a login" in served.error.what
    assert served.running.guest is None


async def test_a_machine_that_ends_while_it_is_used(served: Served) -> None:
    served.stand_in.end(MachineState.CRASHED, "QEMU ended by itself")
    with trio.fail_after(10):
        await served.done.wait()
    assert served.error is None
    assert served.running.guest is None
