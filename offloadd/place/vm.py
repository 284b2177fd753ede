"""A build in a guest: a VM of its own, or one that its user started."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from offloadd.builder.run import run_build
from offloadd.errors import MachineLostError, TransientError
from offloadd.guest.agent import Agent, AgentProcess
from offloadd.model.quantity import format_date
from offloadd.nursery import open_narrow_nursery
from offloadd.place.place import Place
from offloadd.unchanged import Signature, sign
from offloadd.vm.instance import Instance, while_running

MOUNTED = "/run/offload/environment"
"""Where a guest shows the environment that was mounted in it before its build came."""


class GuestService:
    """The build service of a guest, which its agent has loaded already."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def open_process(self) -> AbstractAsyncContextManager[AgentProcess]:
        return self._agent.open_process("build-service")


class AgentShell:
    """A guest where commands of the shell can be run, as root."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def open_process(self, command: str) -> AbstractAsyncContextManager[AgentProcess]:
        return self._agent.open_process("/bin/sh", "-c", command)


async def mount_environment(instance: Instance, agent: Agent, environment: Path) -> None:
    """Have the guest show the environment's disk at MOUNTED from now on.

    Raises:
        AgentError: it cannot.
        HostError: there is no such disk any more.
        MachineLostError: the machine has ended.
    """
    await agent.call("mount", serial=await instance.attach_disk(environment), path=MOUNTED)


@asynccontextmanager
async def open_in_guest(
    instance: Instance, agent: Agent, environment: Path, *, own: bool, mounted: Signature = ()
) -> AsyncIterator[Place]:
    """A place in a guest that runs, with the environment's disk plugged in.

    Args:
        mounted: the disk that the guest shows at MOUNTED already; an environment that was made anew is another one.
        own: the guest was booted for this build alone, so that its clock is ours to set.
    Raises:
        MachineLostError: the instance ended under the build.
    """
    plan = instance.record.plan
    date = plan.date.timestamp()
    clock: Callable[[], float] = (lambda: date) if own else instance.record.clock
    disks = GuestDisks(instance)
    async with while_running(instance, MachineLostError):
        try:
            serial = MOUNTED if mounted and mounted == sign([environment]) else await disks.attach(environment)
            yield Place(
                run=partial(run_build, GuestService(agent)),
                environment=serial,
                clock=clock,
                set_clock=own,
                disks=disks,
                facts=describe(instance) | {"own_vm": own},
            )
        finally:
            if not own:
                await disks.take_back()


class GuestDisks:
    """The disks that were put into a guest's drives for one build."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._serials: list[str] = []

    async def attach(self, path: Path, *, writable: bool = False) -> str:
        """Put one in, as `Instance.attach_disk`."""
        serial = await self._instance.attach_disk(path, writable=writable)
        self._serials.append(serial)
        return serial

    async def take_back(self) -> None:
        """Take all of them out of a machine that lives on.  One that stays costs a drive, not the build."""
        with trio.CancelScope(shield=True):
            async with open_narrow_nursery() as nursery:
                for serial in self._serials:
                    nursery.start_soon(self._detach, serial)

    async def _detach(self, serial: str) -> None:
        with suppress(TransientError, trio.TooSlowError):
            await self._instance.detach_disk(serial)


def describe(instance: Instance) -> dict[str, Any]:
    """What a build's record says of the machine that it was in."""
    record = instance.record
    plan = record.plan
    return {
        "instance": plan.instance,
        "image": plan.boot.image,
        "image_digest": plan.boot.digest,
        "cpu": plan.cpu,
        "cpu_count": plan.cpu_count,
        "missing_cpu_features": list(record.missing_features),
        "memory_mib": plan.memory_mib,
        "accelerator": plan.qemu.accelerator,
        "qemu": plan.qemu.version,
        "date": format_date(plan.date),
        "cores": list(record.cores),
    }
