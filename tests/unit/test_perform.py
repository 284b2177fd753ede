"""Where a build goes when its machine, or the emulator there, has failed it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from offloadd.daemon import perform
from offloadd.daemon.active import ActiveBuild
from offloadd.daemon.dispatch import Assignment, Dispatcher
from offloadd.daemon.events import EventLog
from offloadd.daemon.machines import Machines
from offloadd.daemon.perform import Performer
from offloadd.daemon.pool import Pool
from offloadd.daemon.work import Work
from offloadd.daemon.workshop import Workshop
from offloadd.errors import (
    BootError,
    BuildFailedError,
    EmulatorFault,
    MachineLostError,
    NoMachineError,
    NotFoundError,
    OffloadError,
    ProtocolError,
    SshError,
)
from offloadd.model.machine import BinfmtMachine, LocalMachine, Machine
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import BuildState
from offloadd.route import Decision, Emulation, MachineFacts, Needs, find_route
from offloadd.store.database import Database, open_database

SYSTEM = "aarch64-linux"
REQUEST = BuildRequest.model_validate({"recipe": {"name": "hello", "steps": ["true"]}})
USER, FULL = Emulation.USER, Emulation.FULL
FAULT = EmulatorFault("qemu: uncaught target signal 11")


def binfmt() -> Machine:
    return BinfmtMachine.model_validate({"name": "binfmt", "kind": "binfmt"})


def whole(name: str) -> Machine:
    return LocalMachine.model_validate({"name": name, "kind": "local"})


class Case:
    """Machines that do what a test wants: their outcomes one after the other, by the machine's name."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.machines = [binfmt(), whole("vm-1"), whole("vm-2")]
        self.outcomes: dict[str, list[tuple[bool, OffloadError | None]]] = {}
        """Whether its first step began, and how it ended."""
        self.went: list[str] = []
        self.resolved: list[bool] = []
        """For each time that the work was found: with the newest package lists?"""
        self.database = database
        self.active = ActiveBuild("b1", REQUEST, SYSTEM, folder, EventLog(folder / "events.ndjson"))
        database.add_build("b1", "hello", "0", {})
        database.move_build("b1", BuildState.QUEUED)
        self.performer = Performer(
            shop=cast(Workshop, SimpleNamespace(database=database)),
            pool=cast(Pool, None),
            machines=cast(Machines, None),
            dispatcher=cast(Dispatcher, self),
            move=self.move,
        )

    def move(self, active: ActiveBuild, state: BuildState, **changes: Any) -> None:
        self.database.move_build(active.id, state, **changes)

    async def decide(self, needs: Needs, *, without: Collection[str] = ()) -> Decision:
        await trio.lowlevel.checkpoint()
        facts = {
            machine.name: MachineFacts(
                systems=(SYSTEM,),
                emulation=USER if machine.kind == "binfmt" else FULL,
                fault="failed already" if machine.name in without else "",
                running=True,
            )
            for machine in self.machines
        }
        return find_route(needs, self.machines, facts, 0.0)

    @asynccontextmanager
    async def take(
        self, needs: Needs, *, without: Collection[str], waiting: Callable[[str], None]
    ) -> AsyncIterator[Assignment]:
        waiting("a slot")
        decision = await self.decide(needs, without=without)
        machine = decision.best()
        yield Assignment(machine=machine, decision=decision, emulation=decision.candidates[0].facts.emulation)

    async def build_on(self, _: Performer, active: ActiveBuild, work: Work, assignment: Assignment) -> None:
        name = assignment.machine.name
        self.went.append(name)
        active.begin_attempt(work)
        began, error = self.outcomes[name].pop(0)
        if name == "vm-1":
            self.move(active, BuildState.BOOTING)
        if began:
            self.move(active, BuildState.RUNNING)
            active.result["clock"] = 1.0
        if error:
            raise error
        self.move(active, BuildState.COLLECTING)

    async def run(self, **outcomes: tuple[bool, OffloadError | None]) -> OffloadError | None:
        for name, outcome in outcomes.items():
            self.outcomes[name.replace("_", "-")] = [outcome]
        try:
            await self.performer.perform(self.active)
        except OffloadError as exc:
            return exc
        self.move(self.active, BuildState.SUCCEEDED)
        return None


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    async def find_work(request: BuildRequest, system: str, *_: object, fresh: bool = False) -> Work:
        await trio.lowlevel.checkpoint()
        assert REQUEST.recipe
        made.resolved.append(fresh)
        return Work(request=request, system=system, recipe=REQUEST.recipe, version="0", sources=(), date=None)

    with open_database(tmp_path / "db") as database:
        made = Case(tmp_path, database)
        monkeypatch.setattr(perform, "find_work", find_work)
        monkeypatch.setattr(Performer, "_build_on", lambda *arguments: made.build_on(*arguments))
        yield made


@pytest.mark.parametrize(
    "error",
    [
        BootError("no", subject="vm"),
        SshError("the build service ended early"),
        ProtocolError("the guest's clock shows 1970"),
        MachineLostError("QEMU died", subject="vm"),
    ],
)
async def test_what_fails_before_the_first_step_goes_to_the_next_machine(case: Case, error: OffloadError) -> None:
    assert await case.run(binfmt=(False, error), vm_1=(False, BootError("nor here")), vm_2=(True, None)) is None
    assert case.went == ["binfmt", "vm-1", "vm-2"]
    assert case.active.result["machine"] == "vm-2"
    assert error.subject


async def test_what_fails_later_ends_the_build(case: Case) -> None:
    error = MachineLostError("QEMU died", subject="vm")
    assert await case.run(binfmt=(True, error)) is error
    assert case.went == ["binfmt"]


async def test_when_nobody_is_left_the_first_failure_is_told(case: Case) -> None:
    errors = [BootError(name) for name in ("1", "2", "3")]
    assert await case.run(binfmt=(False, errors[0]), vm_1=(False, errors[1]), vm_2=(False, errors[2])) is errors[0]


async def test_a_fault_of_the_emulator_goes_to_a_whole_machine_and_is_remembered(case: Case) -> None:
    assert await case.run(binfmt=(True, FAULT), vm_1=(True, None)) is None
    assert case.went == ["binfmt", "vm-1"]
    assert case.active.result["retried"] == FAULT.what
    quirk = case.database.quirk("hello", SYSTEM)
    assert quirk
    assert (quirk.reason, quirk.build) == (FAULT.what, "b1")


async def test_what_fails_there_too_is_the_build_s_own_doing(case: Case) -> None:
    error = BuildFailedError("step 1 failed")
    assert await case.run(binfmt=(True, FAULT), vm_1=(True, error)) is error
    assert case.database.quirk("hello", SYSTEM) is None


async def test_a_whole_machine_that_fails_leads_to_the_next(case: Case) -> None:
    assert await case.run(binfmt=(True, FAULT), vm_1=(False, BootError("no")), vm_2=(True, None)) is None
    assert case.went == ["binfmt", "vm-1", "vm-2"]
    assert case.database.quirk("hello", SYSTEM)


async def test_a_fault_of_the_emulator_and_no_other_machine(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.machines = [binfmt()]
    assert await case.run(binfmt=(True, FAULT)) is FAULT


async def test_a_whole_machine_that_goes_away_before_it_is_tried(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = case.decide

    async def decide_once(needs: Needs, *, without: Collection[str] = ()) -> Decision:
        decision = await decide(needs, without=without)
        if needs.quirk:
            case.machines = [binfmt()]
        return decision

    monkeypatch.setattr(case, "decide", decide_once)
    assert await case.run(binfmt=(True, FAULT)) is FAULT


async def test_a_machine_that_failed_already_is_no_way_out(case: Case) -> None:
    case.machines = [whole("vm-1"), binfmt()]
    request = REQUEST.model_copy(update={"prefer": ("vm-1",)})
    case.active.request = request
    error = BootError("no")
    assert await case.run(vm_1=(False, error), binfmt=(True, FAULT)) is FAULT
    assert case.went == ["vm-1", "binfmt"]


async def test_nobody_from_the_beginning(case: Case) -> None:
    case.machines = []
    assert isinstance(await case.run(), NoMachineError)


GONE = NotFoundError("bookworm has no debhelper=13.11.4 for arm64")


async def test_what_the_mirrors_have_replaced_is_resolved_once_more(case: Case) -> None:
    case.active.request = BuildRequest.model_validate({"debian": {"package": "hello"}})
    case.outcomes["binfmt"] = [(False, GONE), (True, None)]
    assert await case.run() is None
    assert (case.went, case.resolved) == (["binfmt", "binfmt"], [False, True])


async def test_but_only_once(case: Case) -> None:
    case.active.request = BuildRequest.model_validate({"debian": {"package": "hello"}})
    case.outcomes["binfmt"] = [(False, GONE), (False, GONE)]
    assert await case.run() is GONE
    assert case.resolved == [False, True]


async def test_a_recipe_names_its_packages_itself(case: Case) -> None:
    assert await case.run(binfmt=(False, GONE)) is GONE
    assert (case.went, case.resolved) == (["binfmt"], [False])
