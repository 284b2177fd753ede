"""What is booted and cloned in this process, without a daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from bench.login import Login, make_login
from bench.measure import BenchError
from bench.systemd_image import SystemdImage, ensure_systemd_image
from bench.workplace import MACHINE, Workplace
from offloadd.daemon.guests import FreshGuest, Guests
from offloadd.daemon.pool import Pool, open_pool
from offloadd.daemon.workshop import Workshop, open_workshop
from offloadd.guest.open import install_secrets, start_sshd
from offloadd.image.store import Image
from offloadd.model.machine import SSH_PORT, VmMachine
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.process import Progress, silent

STARTED_LIMIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Stock:
    """The images, and how guests are made of ours."""

    folder: Path
    """Thrown away at the end."""
    shop: Workshop
    machine: VmMachine
    guests: Guests
    pool: Pool
    plan: VmPlan
    """Of our image, with free ports."""
    ours: Image
    systemd: SystemdImage

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @asynccontextmanager
    async def open_clone(self, instance: str) -> AsyncIterator[FreshGuest]:
        """A guest as the first build gets it, for the length of the block; the first one makes the template.

        Raises:
            BenchError: it is no clone.
        """
        plan = replace(self.plan, instance=instance)
        told: list[str] = []

        def tell(text: str, fraction: float | None) -> None:
            told.append(text)

        async with self.guests.open(plan, self.machine, tell, logs=self.logs, purpose="build") as guest:
            if guest.origin != "clone":
                raise BenchError(f"a guest was booted that should have been a clone: {'; '.join(told)}")
            yield guest

    async def until_one_is_started(self) -> None:
        """Wait until a clone is started ahead, as is done beside a build.

        Raises:
            BenchError: there is none after a while.
        """
        with trio.move_on_after(STARTED_LIMIT_S):
            if not self.pool.waiting():
                async with self.open_next("before"):
                    pass
            while not self.pool.waiting():  # noqa: ASYNC110 - nobody is told
                await trio.sleep(0.05)
            return
        raise BenchError("no clone was started ahead")

    @asynccontextmanager
    async def open_next(self, instance: str) -> AsyncIterator[FreshGuest]:
        """A guest as the next build gets it: one that is started ahead, when there is one.

        Raises:
            BenchError: it is no clone.
        """
        # Without ports, and with the disks of a clone, as builds have it.
        plan = plan_for_build(self.plan, instance, date=None, cpu=None, pinned_cpu=True)
        machine = self.machine.model_copy(update={"warm": 0})
        async with self.pool.open(plan, machine, self.folder, silent, logs=self.logs) as guest:
            if guest.origin != "clone":
                raise BenchError("a guest was booted that should have been a clone")
            yield guest

    async def admit(self, guest: FreshGuest) -> Login:
        """Give the guest its keys and start its sshd."""
        secrets = self.shop.secrets(self.machine)
        await install_secrets(guest.agent, secrets.root)
        await start_sshd(guest.agent)
        machine = {
            "name": self.machine.name,
            "ssh_port": guest.instance.port(SSH_PORT),
            "client_key": str(secrets.client_key),
            "host_keys": [path.read_text() for path in secrets.host_keys],
        }
        return make_login(machine, self.folder)


@asynccontextmanager
async def open_stock(place: Workplace, tell: Progress) -> AsyncIterator[Stock]:
    """Make the images, when there are none yet."""
    async with open_workshop(place.paths, place.paths.state / "bench.sqlite") as shop, open_pool(Guests(shop)) as pool:
        library = shop.library()
        machine = library.vm(MACHINE)
        plan = await shop.plan(machine, library, tell)
        image = await shop.image(library, machine.image, tell)
        yield Stock(
            folder=place.folder,
            shop=shop,
            machine=machine,
            guests=pool.guests,
            pool=pool,
            plan=replace(plan, forwards=tuple((0, guest) for _, guest in plan.forwards)),
            ours=image,
            systemd=await ensure_systemd_image(image, place.paths, tell),
        )
