"""What the router is told: what a build needs, and what is known of each machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from offloadd.breaker import Breaker
from offloadd.model.state import MachineMode


class Emulation(IntEnum):
    """How far a machine is from running the build's instructions itself; less is faster."""

    NONE = 0
    """Native; a VM with KVM is."""
    USER = 1
    """qemu-user: each process is emulated, the kernel is the host's."""
    FULL = 2
    """A whole machine is emulated, kernel and all."""

    @property
    def label(self) -> str:
        return ("native", "user emulation", "full emulation")[self]


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What one build asks of its machine."""

    system: str
    name: str
    """Of what is built; for messages."""
    date: datetime | None = None
    """In UTC; None: the machine's own will do."""
    cpu: str | None = None
    kernel: str | None = None
    """What the kernel's version begins with."""
    features: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    """Names of Debian packages that its environment has; a machine without environments must name them among its features."""
    debian: bool = False
    """Whether it is a Debian package, whose dependencies an environment has, or a childhurd's own apt installs."""
    network: bool = False
    memory_mib: int | None = None
    disk: int | None = None
    """Bytes."""
    environment: str = ""
    """Digest; empty when it is not known."""
    machine: str | None = None
    """Nobody else may take it."""
    prefer: tuple[str, ...] = ()
    """Names or kinds of machines that are taken first of those that can, in this order."""
    keep_machine: bool = False
    """It is built in the machine that runs for its user, or is started for it, and goes on afterwards."""
    quirk: str = ""
    """Why user emulation is not to be tried; empty when it may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFacts:
    """What is known of one machine now."""

    systems: tuple[str, ...]
    """Declared or found: what it builds when all is well."""
    emulation: Emulation = Emulation.NONE
    missing: Mapping[str, str] = field(default_factory=dict)
    """System type -> why it cannot be built just now."""
    fault: str = ""
    """Why the machine cannot be used at all."""
    remedy: str = ""
    """The command that mends that, where there is one."""
    mode: MachineMode = MachineMode.ONLINE
    breaker: Breaker = Breaker()  # noqa: RUF009 - frozen
    running: bool = False
    """Whether a build can begin without a boot: it is no VM, or has a template of which builds get clones."""
    takes_builds: bool = True
    """Whether its guests build for us: not those of a disk that somebody else has made, unless it is a childhurd's whose file
    lets it."""
    stateful: bool = False
    """Whether it keeps its disk: builds are done in the machine itself then, as there can be no other on that disk."""
    started: bool = False
    """Whether a VM runs for its user."""
    busy: int = 0
    """Slots taken."""
    load: float | None = None
    """For each core."""
    memory_mib: int | None = None
    disk_free: int | None = None
    """Bytes."""
    environments: frozenset[str] = frozenset()
    """Digests of those that it has."""
    kernel: str = ""
    """Version; empty when it is not known."""
