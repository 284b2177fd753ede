"""What an earlier daemon left: its users' machines go on, and the machines of its builds end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from offloadd.daemon.machines import Machines, RunningMachine
from offloadd.daemon.workshop import Workshop
from offloadd.errors import MachineLostError, OffloadError
from offloadd.guest.open import open_by_ssh
from offloadd.guest.secret_root import SecretRoot, find_secret_root
from offloadd.model.machine import VmMachine
from offloadd.model.state import MachineState
from offloadd.vm.home import drop_old_logs, log_folder
from offloadd.vm.instance import Instance, adopt_instance
from offloadd.vm.record import InstanceRecord, read_record

log = structlog.get_logger()


@dataclass(frozen=True)
class Adoption:
    """Brings it to rest, before anything else is started."""

    shop: Workshop
    machines: Machines

    async def reconcile(self) -> None:
        """Give `machines` those that run, end the others, and note which are lost."""
        names = set()
        for directory in sorted(self.shop.paths.instances.glob("*")):
            record = read_record(directory / "instance.json")
            # One that was never let go has nothing in it worth keeping.
            if record is not None and record.began and record.purpose == "machine" and self._declared(record.plan.machine):
                running = RunningMachine(record.plan.machine, self._declaration(record.plan.machine))
                names.add(running.name)
                self.machines.own(running, partial(self._adopt, running, directory, record))
            else:
                await self._end_left(directory)
        for row in self.shop.database.machines():
            busy = row.state in (MachineState.STARTING, MachineState.RUNNING, MachineState.STOPPING)
            if busy and row.name not in names:
                self.machines.move(row.name, MachineState.CRASHED, "the daemon ended while it ran, and so did it")

    async def _adopt(self, running: RunningMachine, directory: Path, record: InstanceRecord) -> None:
        with self.shop.cores.hold(record.cores):
            instance = await self._go_on(running, directory, record)
        if running.declared is not None and await self.machines.starts_again(running, instance):
            await self.machines.boot_and_wait(running, running.declared)

    async def _go_on(self, running: RunningMachine, directory: Path, record: InstanceRecord) -> Instance:
        """Until the end of the instance that the earlier daemon started."""
        running.secrets = self._secrets_of(running.name)
        logs = log_folder(self.shop.paths.logs / running.name)
        async with adopt_instance(directory, logs=logs, bridge=self.shop.bridge) as running.instance:
            if running.instance is None:
                raise MachineLostError("ended while no daemon ran", subject=running.name)
            log.info("machine adopted", machine=running.name, pid=record.pid)
            # The earlier daemon may have been killed before it sent the secrets.
            fresh = self.shop.database.machine(running.name).state is MachineState.STARTING
            running.was_ready = not fresh
            if record.plan.boot.has_agent:
                await self.machines.serve(running, running.instance, fresh=fresh)
                return running.instance
            if fresh:
                async with open_by_ssh(running.instance, running.secrets, self.shop.bridge, running.tell, adopted=True):
                    pass
            await self.machines.be_ready(running, running.instance, None)
            return running.instance

    def _secrets_of(self, name: str) -> SecretRoot:
        """Also when its file or one of its keys has become wrong while it ran: that is no reason to end it."""
        try:
            return self.shop.secrets(self.shop.library().vm(name))
        except OffloadError as exc:
            log.warning("its secrets are not looked after", machine=name, error=str(exc))
            return find_secret_root(name, self.shop.paths.secrets)

    def _declared(self, name: str) -> bool:
        try:
            return name in self.shop.library().machines
        except OffloadError as exc:
            log.error("the configuration is wrong", error=str(exc))
            return True

    def _declaration(self, name: str) -> VmMachine | None:
        try:
            return self.shop.library().vm(name)
        except OffloadError:
            return None

    async def _end_left(self, directory: Path) -> None:
        lost = self.shop.paths.logs / "lost"
        drop_old_logs(lost)
        logs = lost / directory.name
        try:
            async with adopt_instance(directory, logs=logs, bridge=self.shop.bridge):
                log.info("ended what an earlier daemon left", instance=directory.name)
        except OffloadError as exc:
            log.warning("ended what an earlier daemon left", instance=directory.name, error=str(exc))
