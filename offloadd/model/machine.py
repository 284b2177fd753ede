"""What a machine's YAML file declares: one class for each kind; childhurds are in `childhurd`, all of them in `kinds`.

Field names and defaults are those of Guix's records *virtual-build-machine* and *build-machine*, so that its manual applies.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from offloadd.model.base import Date, Duration, Feature, Name, Text, Value
from offloadd.model.quantity import check_clock_holds
from offloadd.model.system import SYSTEMS, SystemName

Port = Annotated[int, Field(ge=1, le=65535)]

SSH_PORT = 22
"""The guest's port on which whoever uses the machine logs in."""
OLD_SSH_PORT = 2222
"""The same in childhurds made before Guix moved it."""
SECRETS_PORT = 1004
"""The guest's port on which a guest without our agent takes its secrets (Guix: gnu/services/virtualization.scm)."""

BuildDaemon = Literal["guix", "nix"]
"""Who sends builds to our machines by itself: guix-daemon, nix-daemon."""


class Machine(Value):
    """What all kinds of machine have."""

    kind: str
    name: Name
    systems: Annotated[tuple[SystemName, ...], Field(strict=False)] = ()
    """What it builds for."""
    parallel_builds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Its slots."""
    speed: Annotated[float, Field(gt=0, le=1000, strict=False)] = 1.0
    """Relative to other machines: a faster one is taken first."""
    overload_threshold: Annotated[float, Field(gt=0, strict=False)] | None = 0.8
    """The load for each core above which it is taken only when no other machine can; None: never mind the load."""
    features: Annotated[tuple[Feature, ...], Field(strict=False)] = ()
    network: bool = False
    """Whether builds that ask for the network get it here."""


class LocalMachine(Machine):
    """This host: builds run in bubblewrap.  `systems` is by default what its processor runs."""

    kind: Literal["local"]


class BinfmtMachine(Machine):
    """This host with qemu-user through binfmt_misc.  `systems` is by default every one that is registered."""

    kind: Literal["binfmt"]
    stuck_timeout: Duration = 300.0
    """Seconds without output and without processor time after which the emulator is taken to hang."""

    @field_validator("systems")
    @classmethod
    def _emulated(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        for system in systems:
            if SYSTEMS[system].user is None:
                raise ValueError(f"QEMU has no user-mode emulation of {system}")
        return systems


class SshMachine(Machine):
    """A remote host that is reached over SSH; builds use what it has installed."""

    kind: Literal["ssh"]
    systems: Annotated[tuple[SystemName, ...], Field(min_length=1, strict=False)]
    host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_-]*$")]
    port: Port = SSH_PORT
    user: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "offload"
    host_key: Text
    """Its public key, as in the file ssh_host_ed25519_key.pub: nothing else is taken for this host."""
    private_key: Text
    """The file with our own key; an absolute path."""
    daemons: Annotated[tuple[BuildDaemon, ...], Field(strict=False)] = ()
    """Whose builds it takes: those that run there, with `user` trusted."""

    @field_validator("host_key")
    @classmethod
    def _is_public_key(cls, key: str) -> str:
        if not re.fullmatch(r"(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( .*)?", key.strip()):
            raise ValueError("must be a public key: `ssh-ed25519 AAAA...`")
        return key.strip()

    @field_validator("private_key")
    @classmethod
    def _found_from_anywhere(cls, path: str) -> str:
        return _absolute(path)


class VmMachine(Machine):
    """A virtual machine whose date and CPU are chosen: what both kinds of it have."""

    systems: Annotated[tuple[SystemName, ...], Field(min_length=1, strict=False)]
    """Stands before `date`, which is checked against the clock of the first."""
    image: Name
    qemu: Text | None = None
    """QEMU's binary; by default the one for the first of `systems`."""
    cpu: Text | None = None
    """A model that QEMU knows; by default the newest one released before `date`."""
    cpu_count: Annotated[int, Field(ge=1, le=255)] = 4
    memory_size: Annotated[int, Field(ge=128, le=4 * 1024 * 1024)] = 2048
    """MiB."""
    date: Date | None = None
    """None: the host's."""
    port_forwardings: dict[Port, Port] = Field(default={11022: SSH_PORT})
    """Host port on 127.0.0.1 -> guest port."""
    auto_start: bool = False
    daemons: Annotated[tuple[BuildDaemon, ...], Field(strict=False)] = ()
    """Whose builds it takes: its image has them.  They have it started when they need it; it is stopped when it was idle."""
    idle_timeout: Duration = 600.0
    """Seconds without a build after which a machine that a build daemon had started is stopped."""
    secret_root: Text | None = None
    """The directory whose files are copied into the guest at boot; by default one is made in the state directory."""
    template: bool = True
    """Whether guests are clones of one that was saved, where QEMU can do that."""
    warm: Annotated[int, Field(ge=0, le=64)] = 0
    """Clones that are kept ready, paused."""
    boot_timeout: Duration = 180.0
    """Seconds from the start of QEMU to a guest that can be talked to."""
    options: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Further arguments for QEMU."""

    @property
    def volatile(self) -> bool:
        """Whether what its guest writes is gone when it ends."""
        return True

    @property
    def forwards(self) -> tuple[tuple[int, int], ...]:
        """(host port on 127.0.0.1, guest port)."""
        return tuple(sorted(self.port_forwardings.items()))

    @property
    def ssh_forward(self) -> int:
        """The host's port that leads to its sshd."""
        hosts = {guest: host for host, guest in self.forwards}
        return hosts[SSH_PORT if SSH_PORT in hosts else OLD_SSH_PORT]

    @field_validator("port_forwardings")
    @classmethod
    def _guest_ports_once(cls, forwardings: dict[int, int]) -> dict[int, int]:
        guests = list(forwardings.values())
        if not {SSH_PORT, OLD_SSH_PORT} & set(guests):
            raise ValueError(f"the guest's port {SSH_PORT} must be forwarded: whoever uses the machine logs in there")
        if len(set(guests)) < len(guests):
            raise ValueError("a guest port is forwarded twice")
        return forwardings

    @field_validator("date")
    @classmethod
    def _clock_holds_date(cls, date: datetime | None, info: ValidationInfo) -> datetime | None:
        if date is not None and (systems := info.data.get("systems")):  # else they are wrong, which is told already
            check_clock_holds(date, systems[0])
        return date

    @field_validator("secret_root")
    @classmethod
    def _found_from_anywhere(cls, root: str | None) -> str | None:
        return None if root is None else _absolute(root)


class BuildVm(VmMachine):
    """A VM of the host's own architecture family, x86."""

    kind: Literal["build-vm"]
    systems: Annotated[tuple[SystemName, ...], Field(min_length=1, strict=False)] = ("x86_64-linux",)
    date: Date | None = datetime(2020, 1, 1, tzinfo=UTC)

    @field_validator("systems")
    @classmethod
    def _run_on_x86(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        for system in systems:
            if system not in ("x86_64-linux", "i686-linux"):
                raise ValueError(f"a build-vm cannot be of type {system}: only x86_64-linux and i686-linux")
        return systems


RUNS_TOO = {"x86_64-linux": "i686-linux", "aarch64-linux": "armhf-linux"}
"""A system type -> the 32-bit one whose programs its processors and its kernel run by themselves."""


class EmulatedVm(VmMachine):
    """A VM of another architecture: full-system emulation with Debian's kernel of that architecture."""

    kind: Literal["emulated-vm"]
    boot_timeout: Duration = 600.0

    @field_validator("systems")
    @classmethod
    def _one_target(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        for system in systems:
            if SYSTEMS[system].kernel != "linux":
                raise ValueError(f"an emulated-vm cannot be of type {system}: only Linux")
            if system not in (systems[0], RUNS_TOO.get(systems[0])):
                raise ValueError(
                    f"a machine of type {systems[0]} does not run {system}: the first of the list is the machine's own"
                )
        return systems


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path: the daemon runs in another directory")
    return path
