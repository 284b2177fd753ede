"""A build in a guest: a VM of its own, or one that its user started."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from offloadd.errors import MachineLostError, TransientError
from offloadd.guest.ssh import Guest, GuestProcess
from offloadd.model.quantity import format_date
from offloadd.place.place import Place
from offloadd.vm.instance import Instance, while_running

COMMAND = "sudo -n /usr/lib/offload/build-service"


class GuestService:
    """The build service of a guest."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def open_process(self) -> AbstractAsyncContextManager[GuestProcess]:
        return self._guest.open_process(COMMAND)


@asynccontextmanager
async def open_in_guest(instance: Instance, guest: Guest, environment: Path, serial: str, *, own: bool) -> AsyncIterator[Place]:
    """A place in a guest that runs, with the environment's disk plugged in.

    Args:
        serial: of that disk, at most 20 characters.
        own: the guest was booted for this build alone, so that its clock is ours to set.
    Raises:
        MachineLostError: the instance ended under the build.
    """
    plan = instance.record.plan
    base, began = plan.date.timestamp(), instance.record.began
    clock: Callable[[], float] = (lambda: base) if own else (lambda: base + time.time() - began)
    async with while_running(instance, MachineLostError):
        try:
            await instance.attach_disk(environment, serial)
            yield Place(
                service=GuestService(guest),
                environment=serial,
                clock=clock,
                set_clock=own,
                facts=_facts(instance) | {"own_vm": own},
            )
        finally:
            if not own:
                await _take_disk_back(instance, serial)


async def _take_disk_back(instance: Instance, serial: str) -> None:
    """From a machine that lives on.  A guest that keeps the disk costs a slot of its bus, not the build."""
    with trio.CancelScope(shield=True), suppress(TransientError, trio.TooSlowError):
        await instance.detach_disk(serial)


def _facts(instance: Instance) -> dict[str, Any]:
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
