"""The machines that take builds of guix-daemon and nix-daemon, with all that these have to know to log in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import structlog
import trio

from offloadd.config.library import Library
from offloadd.daemon.machines import Machines
from offloadd.daemon.workshop import Workshop
from offloadd.errors import OffloadError
from offloadd.guest.secret_root import ACCOUNT, SecretRoot
from offloadd.model.childhurd import Childhurd
from offloadd.model.image import FileImage
from offloadd.model.machine import BuildDaemon, Machine, SshMachine, VmMachine
from offloadd.model.offer import Offer, OfferState
from offloadd.model.state import MachineMode, MachineState

LOOPBACK = "127.0.0.1"

log = structlog.get_logger()


async def offers(workshop: Workshop, machines: Machines, daemon: BuildDaemon | None = None) -> list[Offer]:
    """One for each machine that has `daemons`, whatever its state, by name.

    None for those that are drained or offline, or whose image is not set up.

    Keys of a virtual machine are made when they are missing: its first builder may come before its first start.
    Somebody who writes a machine's file does not take the others from build daemons: while it is wrong they are as before.

    Args:
        daemon: only those that take this one's builds.
    Raises:
        ConfigError: a machine's file is wrong, and was so when we were started.
    """
    # One that runs is as it was when it was started, until its file is read again.
    library = workshop.shelf.last_right()
    known: dict[str, Machine] = {**library.machines, **machines.declared()}
    found = []
    for name in sorted(known):
        machine = known[name]
        if not isinstance(machine, SshMachine | VmMachine) or not takes(machine, daemon):
            continue
        if isinstance(machine, VmMachine) and not _has_image(library, machine):
            continue
        if workshop.database.machine_mode(name) is not MachineMode.ONLINE:
            continue
        try:
            found.append(await offer(workshop, machines, machine))
        except OffloadError as exc:  # its keys cannot be read or written: the others are as good as before
            log.warning("machine not offered", machine=name, error=str(exc))
    return found


def _has_image(library: Library, machine: VmMachine) -> bool:
    """Whether it could be started."""
    image = library.images.get(machine.image)
    return not isinstance(image, FileImage) or image.is_set_up


def with_copied_keys(found: Iterable[Offer], copies: Path) -> list[Offer]:
    """Those whose client key has a copy in the folder `copies`, which they name instead of our own."""
    pairs = [(offer, copies / offer.machine) for offer in found]
    return [offer.model_copy(update={"private_key": str(copy)}) for offer, copy in pairs if copy.is_file()]


def takes(machine: SshMachine | VmMachine, daemon: BuildDaemon | None) -> bool:
    """Whether the machine takes builds of `daemon`; of any, when it is None."""
    if isinstance(machine, Childhurd) and not machine.offloading:
        return False
    return daemon in machine.daemons if daemon else bool(machine.daemons)


async def offer(workshop: Workshop, machines: Machines, machine: SshMachine | VmMachine) -> Offer:
    """The offer of one machine.

    Raises:
        HostError: its secrets cannot be read or written.
    """
    if isinstance(machine, SshMachine):
        return _offer(
            machine,
            host=machine.host,
            port=machine.port,
            user=machine.user,
            host_key=_without_comment(machine.host_key),
            private_key=machine.private_key,
            state="running",
        )
    secrets, host_key = await trio.to_thread.run_sync(_secrets, workshop, machine)
    return _offer(
        machine,
        host=LOOPBACK,
        port=_ssh_port(machines, machine),
        user=ACCOUNT,
        host_key=host_key,
        private_key=str(secrets.client_key),
        state=_state(workshop, machines, machine.name),
    )


def _offer(
    machine: SshMachine | VmMachine, *, host: str, port: int, user: str, host_key: str, private_key: str, state: OfferState
) -> Offer:
    return Offer(
        machine=machine.name,
        host=host,
        port=port,
        user=user,
        host_key=host_key,
        private_key=private_key,
        systems=machine.systems,
        parallel_builds=machine.parallel_builds,
        speed=machine.speed,
        features=machine.features,
        overload_threshold=machine.overload_threshold,
        daemons=machine.daemons,
        state=state,
    )


def _secrets(workshop: Workshop, machine: VmMachine) -> tuple[SecretRoot, str]:
    secrets = workshop.secrets(machine)
    # The first is of the type that both daemons ask sshd for.
    return secrets, _without_comment(secrets.host_keys[0].read_text())


def _without_comment(key: str) -> str:
    return " ".join(key.split()[:2])


def _ssh_port(machines: Machines, machine: VmMachine) -> int:
    running = machines.find(machine.name)
    if running is not None and running.instance is not None:
        return running.instance.ssh_port
    return machine.ssh_forward


def _state(workshop: Workshop, machines: Machines, name: str) -> OfferState:
    """One that is being stopped counts as stopped: it takes no new build."""
    stored = workshop.database.machine(name).state
    if stored is MachineState.RUNNING and machines.find(name) is not None:
        return "running"
    # Between two connections to its guest it is, for whoever wants to use it, as one that starts.
    return "starting" if stored in (MachineState.STARTING, MachineState.RUNNING) else "stopped"
