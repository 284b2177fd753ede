"""Machines of other architectures: Debian's own kernel of each, emulated as a whole.

One is booted always.  The others take minutes for their images: OFFLOAD_TEST_EMULATED has the system types that are to be
booted, or `all`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from offloadd.bridge import Bridge, open_bridge
from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.prepare import prepare_source
from offloadd.config.library import Library, load_library
from offloadd.environment.recipe import environment_recipe
from offloadd.environment.store import EnvironmentStore
from offloadd.guest.agent import Agent
from offloadd.guest.open import open_guest
from offloadd.image.store import ImageStore
from offloadd.model.image import ImageRecipe
from offloadd.model.machine import VmMachine
from offloadd.model.state import MachineState
from offloadd.model.system import SYSTEMS
from offloadd.paths import shipped
from offloadd.place.vm import open_in_guest
from offloadd.plan.machine import QemuFacts, VmPlan, default_qemu, plan_for_build, plan_vm
from offloadd.plan.target import find_target
from offloadd.vm.instance import Instance, open_instance
from offloadd.vm.pinning import Cores
from offloadd.vm.qemu import find_qemu

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"
LIBRARY = load_library([shipped()])
EMULATED = {machine.systems[0]: machine for machine in LIBRARY.vms.values() if machine.kind == "emulated-vm"}
ASKED = os.environ.get("OFFLOAD_TEST_EMULATED", "aarch64-linux").split(",")
SYSTEMS_BOOTED = sorted(EMULATED) if ASKED == ["all"] else ASKED

DATE = datetime(2013, 6, 1, tzinfo=UTC)
CPUS = {
    "aarch64-linux": ("cortex-a57", "0xd07"),
    "armhf-linux": ("cortex-a15", "ARMv7 Processor rev 0 (v7l)"),
    "powerpc64le-linux": ("power8", "POWER8"),
    "riscv64-linux": ("rv64", "rv64imafdc"),
    "s390x-linux": ("max", "version = "),
}
"""The model of that date, and a word of the guest's own that tells it."""


@dataclass
class Log:
    """A listener."""

    text: str = ""
    steps: list[str] = field(default_factory=list)

    def started(self, report: Report) -> None:
        pass

    def step(self, index: int, count: int, command: str) -> None:
        self.steps.append(command)

    def log(self, text: str) -> None:
        self.text += text

    def collecting(self) -> None:
        pass


async def plan(machine: VmMachine, library: Library) -> VmPlan:
    recipe = library.image(machine.image)
    assert isinstance(recipe, ImageRecipe)
    image = await ImageStore(CACHE / "images").ensure(recipe, library.folders[machine.image])
    binary = await find_qemu(default_qemu(machine))
    facts = QemuFacts(binary=str(binary.path), version=binary.version, cpu_models=binary.cpu_models, accelerator="tcg")
    whole = plan_vm(machine, facts, image.boot)
    return plan_for_build(whole, "emulated", date=DATE, cpu=None, pinned_cpu=False)


@asynccontextmanager
async def boot(system: str, folder: Path) -> AsyncIterator[tuple[Instance, Agent]]:
    async with open_bridge() as bridge, _boot(await plan(EMULATED[system], LIBRARY), folder, bridge) as booted:
        yield booted


@asynccontextmanager
async def _boot(wanted: VmPlan, folder: Path, bridge: Bridge) -> AsyncIterator[tuple[Instance, Agent]]:
    with Cores().share(wanted.cpu_count) as cores:
        opened = open_instance(
            wanted, instances=folder / "run", logs=folder / "logs", bridge=bridge, cores=cores, purpose="build"
        )
        async with opened as instance, open_guest(instance, lambda _: None) as agent:
            yield instance, agent


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path leaves room for a socket's name."""
    return tmp_path_factory.mktemp("e")


async def build(instance: Instance, agent: Agent, system: str, folder: Path, *steps: str) -> tuple[Report, str]:
    recipe = environment_recipe("trixie" if system == "riscv64-linux" else "bookworm", SYSTEMS[system].debian)
    environment = await EnvironmentStore(CACHE / "environments").ensure(recipe)
    source, now, log = folder / "source.tar", int(DATE.timestamp()), Log()
    (folder / "nothing.tar").write_bytes(bytes(10240))
    await trio.to_thread.run_sync(prepare_source, folder / "nothing.tar", [], source, now)
    async with open_in_guest(instance, agent, environment.path, own=True) as place:
        job = Job(
            build="b",
            name="emulated-1",
            steps=steps,
            env={},
            outputs=("made",),
            source=source,
            environment=place.environment,
            personality="linux32" if SYSTEMS[system].bits == 32 else None,
            set_clock=now,
            expected_clock=place.clock,
            timeout_s=300,
            max_silent_s=300,
            keep_failed=False,
        )
        (folder / "outputs.tar").unlink(missing_ok=True)
        with open_outputs_receiver(folder / "outputs.tar") as outputs:
            report = await place.run(job, outputs, log)
    assert place.environment is not None
    await instance.detach_disk(place.environment)
    return report, log.text


@pytest.mark.parametrize("system", SYSTEMS_BOOTED)
async def test_builds_in_an_environment_that_is_plugged_in(system: str, short: Path, binfmt: tuple[str, ...]) -> None:
    model, seen = CPUS[system]
    began = trio.current_time()
    async with boot(system, short) as (instance, agent):
        boot_s = trio.current_time() - began
        assert instance.record.plan.cpu == model
        # The guest's own clock came up at the date: nobody has set it yet.
        assert "offload-init: 2013-06-01T00:0" in instance.files.console_log.read_text()

        # Twice: a disk that is taken away makes room for the next.
        for _ in range(2):
            report, log = await build(
                instance, agent, system, short, "dpkg --print-architecture; date -u +%F; nproc", "cat /proc/cpuinfo >made"
            )
            assert log == f"{SYSTEMS[system].debian}\n2013-06-01\n{instance.record.plan.cpu_count}\n"
            assert report.exit_status == 0
            assert seen in report.started["cpu"]
            assert report.clock_start == pytest.approx(DATE.timestamp(), abs=5)
            assert (short / "outputs.tar").stat().st_size > 0
        print(f"{system}: {boot_s:.1f} s to the agent's hello")


@pytest.mark.parametrize("system", SYSTEMS_BOOTED)
async def test_stops_when_it_is_told(system: str, short: Path, binfmt: tuple[str, ...]) -> None:
    async with boot(system, short) as (instance, _):
        with trio.fail_after(60):
            outcome = await instance.stop()
        console = outcome.console
    assert outcome.state is MachineState.STOPPED
    # Whether by its button or without a word, it is not killed.
    assert outcome.exit_status == 0
    assert ("offload-init: power button" in console) == find_target(system).power_button


async def test_the_64_bit_processor_runs_32_bit_programs(short: Path, binfmt: tuple[str, ...]) -> None:
    async with boot("aarch64-linux", short) as (instance, agent):
        _, log = await build(instance, agent, "armhf-linux", short, "dpkg --print-architecture; uname -m; touch made")
    assert log == "armhf\narmv8l\n"
