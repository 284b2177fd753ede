"""What a machine's YAML file declares.

Field names and defaults are those of Guix's records *virtual-build-machine* and *build-machine*, so that its manual applies.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from offloadd.model.base import Date, Duration, Name, Text, Value
from offloadd.model.quantity import check_clock_holds
from offloadd.model.system import SYSTEMS, SystemName

Port = Annotated[int, Field(ge=1, le=65535)]

SSH_PORT = 22
SECRETS_PORT = 1004
"""The guest's port of the secret service (Guix's number)."""


class Machine(Value):
    """A virtual build machine: a VM whose date and CPU are chosen."""

    kind: Literal["build-vm"]
    name: Name
    image: Name
    qemu: Text | None = None
    """QEMU's binary; by default the one for the first of `systems`."""
    cpu: Text | None = None
    """A model that QEMU knows; by default the newest one released before `date`."""
    cpu_count: Annotated[int, Field(ge=1, le=255)] = 4
    memory_size: Annotated[int, Field(ge=128, le=4 * 1024 * 1024)] = 2048
    """MiB."""
    systems: Annotated[tuple[SystemName, ...], Field(min_length=1, strict=False)] = ("x86_64-linux",)
    """Stands before `date`, which is checked against the clock of the first."""
    date: Date = datetime(2020, 1, 1, tzinfo=UTC)
    port_forwardings: dict[Port, Port] = Field(default={11022: SSH_PORT, 11044: SECRETS_PORT})
    """Host port on 127.0.0.1 -> guest port."""
    auto_start: bool = False
    parallel_builds: Annotated[int, Field(ge=1, le=1000)] = 1
    secret_root: Text | None = None
    """The directory whose files are copied into the guest at boot; by default one is made in the state directory."""
    network: bool = False
    """Whether the guest can reach beyond the host; builds themselves never can."""
    boot_timeout: Duration = 180.0
    """Seconds from the start of QEMU to a guest that can be talked to."""
    options: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Further arguments for QEMU."""

    @field_validator("systems")
    @classmethod
    def _run_on_x86(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        for system in systems:
            if SYSTEMS[system].qemu != "x86_64":
                raise ValueError(f"a build-vm cannot be of type {system}: only x86_64-linux and i686-linux")
        return systems

    @field_validator("port_forwardings")
    @classmethod
    def _guest_ports_once(cls, forwardings: dict[int, int]) -> dict[int, int]:
        guests = list(forwardings.values())
        missing = {SSH_PORT, SECRETS_PORT} - set(guests)
        if missing:
            raise ValueError(f"the guest's port {min(missing)} must be forwarded: offload reaches the guest there")
        if len(set(guests)) < len(guests):
            raise ValueError("a guest port is forwarded twice")
        return forwardings

    @field_validator("date")
    @classmethod
    def _clock_holds_date(cls, date: datetime, info: ValidationInfo) -> datetime:
        if systems := info.data.get("systems"):  # else they are wrong, which is told already
            check_clock_holds(date, systems[0])
        return date

    @field_validator("secret_root")
    @classmethod
    def _found_from_anywhere(cls, root: str | None) -> str | None:
        if root is not None and not root.startswith("/"):
            raise ValueError("must be an absolute path: the daemon runs in another directory")
        return root
