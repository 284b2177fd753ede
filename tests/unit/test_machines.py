"""Machines between their start and their end, with guests that do what a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from offloadd.daemon import adoption as adoption_module
from offloadd.daemon import machines as machines_module
from offloadd.daemon.adoption import Adoption
from offloadd.daemon.guests import REBOOT_PAUSES_S, Guests
from offloadd.daemon.machines import SETTLED_S, Machines, RunningMachine
from offloadd.daemon.places import _check_fits
from offloadd.daemon.trial import Trial
from offloadd.daemon.workshop import Workshop
from offloadd.errors import BootError, HostError, SshError, UsageError
from offloadd.guest.secret_root import SecretRoot, find_secret_root
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import VmMachine
from offloadd.model.state import MachineState
from offloadd.plan.machine import BootFiles, VmPlan, plan_vm
from offloadd.store.database import Database, open_database
from offloadd.vm.outcome import Outcome
from tests.unit.plans import X86_MODELS, facts

NAME = "childhurd"
STATEFUL = Childhurd.model_validate({"kind": "childhurd", "name": NAME, "image": "hurd", "options": []})
DISK = BootFiles(image="hurd", digest="abc", disk=Path("/i/disk"), disk_format="qcow2", disk_size=4 << 30)
PLAN = plan_vm(STATEFUL, facts(cpu_models=X86_MODELS | {"qemu64"}), DISK)


class FakeInstance:
    """A QEMU that runs until somebody ends it."""

    def __init__(self, plan: VmPlan = PLAN) -> None:
        self.record = SimpleNamespace(plan=plan, ports={22: 10022}, cores=(1,), pid=77)
        self.ssh_port = 10022
        self.outcome: Outcome | None = None
        self._ended = trio.Event()

    def end(self, state: MachineState, reason: str = "", *, rebooted: bool = False) -> None:
        if self.outcome is None:
            last = "the last words"
            self.outcome = Outcome(state=state, reason=reason, exit_status=0, stderr="", console=last, rebooted=rebooted)
            self._ended.set()

    def reboot(self) -> None:
        self.end(MachineState.STOPPED_BY_GUEST, "rebooted from inside the guest", rebooted=True)

    async def wait_ended(self) -> Outcome | None:
        await self._ended.wait()
        return self.outcome

    async def stop(self) -> None:
        await trio.lowlevel.checkpoint()
        self.end(MachineState.STOPPED, "stopped by us")


class House:
    """A workshop, and guests that can be logged in to at once."""

    def __init__(self, folder: Path, database: Database, nursery: trio.Nursery) -> None:
        self.database = database
        self.bridge = None
        self.paths = SimpleNamespace(state=folder, logs=folder / "logs", secrets=folder / "secrets", instances=folder / "i")
        self.cores = self
        self.held: list[Sequence[int]] = []
        self.booted: list[tuple[float, FakeInstance]] = []
        self.held_at_boot: list[Sequence[int]] = []
        self.runs_s: float | None = None
        """After how long each guest reboots; None: never."""
        self.nursery = nursery
        self.machines = Machines(cast(Workshop, self), cast(Guests, self), nursery)
        self.secret: SecretRoot | HostError = find_secret_root(NAME, folder / "secrets")

    def library(self) -> Any:
        return SimpleNamespace(vm=lambda name: STATEFUL, machines={NAME: STATEFUL})

    async def plan(self, *_: object) -> VmPlan:
        await trio.lowlevel.checkpoint()
        return PLAN

    def secrets(self, _: VmMachine) -> SecretRoot:
        if isinstance(self.secret, HostError):
            raise self.secret
        return self.secret

    @contextmanager
    def hold(self, cores: Sequence[int]) -> Iterator[None]:
        self.held.append(cores)
        yield
        self.held.remove(cores)

    @asynccontextmanager
    async def open_by_ssh(self, *_: object, booted: Callable[[object], None], **__: object) -> AsyncIterator[Any]:
        instance = FakeInstance()
        booted(instance)
        self.booted.append((trio.current_time(), instance))
        self.held_at_boot += self.held
        if self.runs_s is not None:
            self.nursery.start_soon(self._reboot, instance, self.runs_s)
        yield SimpleNamespace(instance=instance)

    async def _reboot(self, instance: FakeInstance, after_s: float) -> None:
        await trio.sleep(after_s)
        instance.reboot()

    def state(self) -> tuple[MachineState, str]:
        row = self.database.machine(NAME)
        return row.state, row.reason


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    with open_database(tmp_path / "offload.sqlite") as database:
        async with trio.open_nursery() as nursery:
            yield House(tmp_path, database, nursery)
            nursery.cancel_scope.cancel()


def in_guest(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> None:
    """What a command does there."""

    async def run(_: str) -> None:
        await trio.lowlevel.checkpoint()
        command()
        raise SshError("the connection was lost")

    @asynccontextmanager
    async def open_ssh(*_: object) -> AsyncIterator[object]:
        yield SimpleNamespace(run=run)

    monkeypatch.setattr(machines_module, "open_ssh", open_ssh)


async def test_a_guest_that_reboots_while_it_is_stopped_stays_stopped(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await house.machines.start(NAME)
    in_guest(monkeypatch, house.booted[0][1].reboot)
    with trio.fail_after(10):
        await house.machines.stop(NAME)
    assert running.ended.is_set()
    assert len(house.booted) == 1
    assert house.state() == (MachineState.STOPPED, "stopped by us")


async def test_one_that_is_to_be_started_again_can_be_stopped(house: House, autojump_clock: trio.testing.MockClock) -> None:
    house.runs_s = 1.0
    running = await house.machines.start(NAME)
    while not running.phase[0].startswith("it rebooted as soon as it was ready: starting it again in 1"):
        await running.changed.park()
    with trio.fail_after(10):
        await house.machines.stop(NAME)
    assert len(house.booted) == 1
    assert house.state() == (MachineState.STOPPED, "stopped by us")


async def test_a_guest_that_always_reboots_when_it_is_ready_is_given_up(
    house: House, autojump_clock: trio.testing.MockClock
) -> None:
    house.runs_s = 1.0
    running = await house.machines.start(NAME)
    await running.ended.wait()
    times = [moment for moment, _ in house.booted]
    assert [round(after - before - 1.0) for before, after in pairwise(times)] == list(REBOOT_PAUSES_S)
    assert house.state()[0] is MachineState.CRASHED
    assert house.state()[1].startswith("rebooted 6 times in a row")
    assert isinstance(running.error, BootError)
    assert "the last words" in running.error.detail


async def test_reboots_now_and_then_are_nothing(house: House, autojump_clock: trio.testing.MockClock) -> None:
    house.runs_s = SETTLED_S + 1
    running = await house.machines.start(NAME)
    with trio.move_on_after(10.5 * house.runs_s):
        await running.ended.wait()
    assert len(house.booted) == 11
    assert not running.ended.is_set()


class Left:
    """A machine that an earlier daemon has left running."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = house.paths.instances / NAME
        folder.mkdir(parents=True)
        self.instance = FakeInstance()
        self.error: Exception | None = None
        record = SimpleNamespace(plan=PLAN, began=1.0, purpose="machine", cores=(1,), pid=77)
        monkeypatch.setattr(adoption_module, "read_record", lambda _: record)
        monkeypatch.setattr(adoption_module, "adopt_instance", self.adopt)
        house.database.move_machine(NAME, MachineState.STARTING)
        house.database.move_machine(NAME, MachineState.RUNNING)
        self.adoption = Adoption(cast(Workshop, house), house.machines)

    @asynccontextmanager
    async def adopt(self, *_: object, **__: object) -> AsyncIterator[FakeInstance]:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        yield self.instance


@pytest.fixture
def left(house: House, monkeypatch: pytest.MonkeyPatch) -> Left:
    return Left(house, monkeypatch)


async def adopted(house: House) -> RunningMachine:
    with trio.fail_after(10):
        while (running := house.machines.find(NAME)) is None:
            await trio.sleep(0.01)
    return running


async def test_one_whose_secrets_cannot_be_read_goes_on(house: House, left: Left) -> None:
    expected = house.secrets(STATEFUL)
    house.secret = HostError("cannot write the secrets")
    await left.adoption.reconcile()
    assert (await adopted(house)).secrets == expected
    assert house.state()[0] is MachineState.RUNNING


async def test_an_adopted_one_that_reboots_leaves_its_old_cores(house: House, left: Left) -> None:
    await left.adoption.reconcile()
    await adopted(house)
    assert house.held == [(1,)]
    left.instance.reboot()
    with trio.fail_after(10):
        while not house.booted:
            await trio.sleep(0.01)
    assert house.held_at_boot == []
    await adopted(house)


async def test_an_error_of_our_own_ends_an_adopted_one_alone(house: House, left: Left) -> None:
    left.error = RuntimeError("a mistake of ours")
    await left.adoption.reconcile()
    with trio.fail_after(10):
        while len(house.machines):
            await trio.sleep(0.01)
    assert house.state()[0] is MachineState.CRASHED
    assert "an error of offload itself" in house.state()[1]


def test_a_disk_that_stays_is_the_same_when_its_guest_has_written() -> None:
    written = replace(PLAN, boot=replace(DISK, digest="def"))
    _check_fits(STATEFUL, written, PLAN)
    with pytest.raises(UsageError, match="runs from an older image"):
        _check_fits(STATEFUL, replace(PLAN, boot=replace(DISK, disk=Path("/i/other"))), PLAN)


async def test_a_disk_that_stays_is_not_for_a_trial() -> None:
    told: list[object] = []
    trial = Trial(STATEFUL, cast(Workshop, None), cast(Guests, None), lambda *_: None, told.append)
    await trial.run()
    assert not trial.ok
    [check] = trial.checks
    assert told == [check]
    assert "keeps its disk" in check.text
    assert f"offload vm start {NAME}" in check.hint


async def test_one_that_is_started_while_it_is_stopped_begins_anew(house: House) -> None:
    first = await house.machines.start(NAME)
    ends = trio.Event()
    instance = house.booted[0][1]

    async def stop() -> None:
        await ends.wait()
        instance.end(MachineState.STOPPED, "stopped by us")

    instance.stop = stop  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.machines.stop, NAME)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(house.machines.start, NAME)
        await trio.testing.wait_all_tasks_blocked()
        assert len(house.booted) == 1
        ends.set()
    second = house.machines.find(NAME)
    assert second is not None
    assert second is not first
    assert len(house.booted) == 2


async def test_one_that_runs_needs_no_file(house: House) -> None:
    running = await house.machines.start(NAME)
    house.library = None  # type: ignore[method-assign,assignment]
    assert await house.machines.start(NAME) is running
    assert list(house.machines.names()) == [NAME]
