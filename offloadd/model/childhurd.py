"""What the YAML file of a GNU/Hurd machine declares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from offloadd.model.base import Duration, Size, Text
from offloadd.model.machine import OLD_SSH_PORT, SECRETS_PORT, SSH_PORT, Port, VmMachine
from offloadd.model.system import SystemName

HURD_TYPES = {"hurd-qcow2": "i586-gnu", "hurd64-qcow2": "x86_64-gnu"}
"""Guix's image types for the Hurd -> the system type of what runs there."""
SNAPSHOT = ("--snapshot", "-snapshot")
VNC_PORT = 5900
MAX_ID = 40
HOST_FORWARD = re.compile(r"(hostfwd=tcp:[^:,]*:)(\d+)-[^:,]*:(\d+)")
"""In QEMU's `-netdev user`: what stands before the host port, that port, the guest port."""
_MAX_PORT = 65535


class Childhurd(VmMachine):
    """A GNU/Hurd machine, as Guix's *hurd-vm-configuration* declares it."""

    kind: Literal["childhurd"]
    type: Literal["hurd-qcow2", "hurd64-qcow2"] = "hurd-qcow2"
    """32 or 64 bit; `systems` follows from it."""
    systems: Annotated[tuple[SystemName, ...], Field(strict=False)] = ()
    id: Annotated[int, Field(ge=1, le=MAX_ID)] | None = None
    """Of one of several: it ends the machine's name, and moves its ports by a thousand each."""
    cpu_count: Annotated[int, Field(ge=1, le=255)] = 1
    """GNU Mach uses no more unless it was made for that."""
    disk_size: Size | Literal["guess"] = "guess"
    """Bytes of the disk that the guest sees; by default as many as its image has."""
    net_options: Annotated[tuple[Text, ...], Field(strict=False)] | None = None
    """QEMU's arguments for the network, with the forwardings; by default an rtl8139 with `port-forwardings`.

    They stand for the whole network: `network: false` cuts nobody off then, `restrict=on` among them does.
    """
    offloading: bool = True
    """Whether builds go there; else its guest needs no account for us."""
    secret_retries: Annotated[int, Field(ge=0, le=10_000)] = 60
    """How often a connection to its secret service that is refused is tried again, a second apart."""
    secret_handshake_timeout: Duration = 180.0
    """Seconds from the first connection to the guest's complete hello."""
    port_forwardings: dict[Port, Port] = Field(default={})
    """Host port on 127.0.0.1 -> guest port; by default those of `childhurd_forwards`."""
    template: Literal[False] = False
    """A clone of it could not be told its date: that takes our agent."""
    warm: Literal[0] = 0
    boot_timeout: Duration = 300.0
    overload_threshold: Annotated[float, Field(gt=0, strict=False)] | None = 1.8
    """The load that the Hurd reports is one too high."""
    options: Annotated[tuple[Text, ...], Field(strict=False)] = (SNAPSHOT[0],)

    @property
    def volatile(self) -> bool:
        return bool(set(SNAPSHOT) & set(self.options))

    @property
    def forwards(self) -> tuple[tuple[int, int], ...]:
        return super().forwards if self.net_options is None else _net_forwards(self.net_options)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: object) -> object:
        """What follows from `type` and `id`; what is wrong in them is told by their own fields."""
        if not isinstance(values, dict):
            return values
        derived, systems, number = dict(values), values.get("systems"), values.get("id")
        types = [kind for kind, system in HURD_TYPES.items() if systems in ([system], (system,))]
        derived["type"] = values.get("type") or next(iter(types), "hurd-qcow2")
        if systems in (None, [], ()):
            derived["systems"] = (HURD_TYPES.get(str(derived["type"]), "i586-gnu"),)
        ports = "port_forwardings" if "port_forwardings" in values else "port-forwardings"
        if not values.get(ports):
            derived[ports] = childhurd_forwards(number if isinstance(number, int) and 1 <= number <= MAX_ID else None)
        return derived

    @field_validator("type")
    @classmethod
    def _builds_for_its_system(cls, kind: str, info: ValidationInfo) -> str:
        own, systems = HURD_TYPES[kind], info.data.get("systems")
        if systems is not None and systems != (own,):
            raise ValueError(f"a childhurd of type {kind} builds for {own} alone, not {', '.join(systems)}")
        return kind

    @field_validator("id")
    @classmethod
    def _ends_its_name(cls, number: int | None, info: ValidationInfo) -> int | None:
        name = info.data.get("name")
        if number is not None and name is not None and not name.endswith(str(number)):
            raise ValueError(f"a childhurd with the id {number} has a name that ends with it: {name}{number}")
        return number

    @field_validator("net_options")
    @classmethod
    def _leads_in(cls, options: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if options is not None:
            forwards = _net_forwards(options)
            inside = {guest for _, guest in forwards}
            if SECRETS_PORT not in inside or not {SSH_PORT, OLD_SSH_PORT} & inside:
                raise ValueError(
                    f"must forward the guest's ports {SECRETS_PORT} and {SSH_PORT}: hostfwd=tcp:127.0.0.1:PORT-:{SSH_PORT}"
                )
            for port in (port for forward in forwards for port in forward):
                if not 1 <= port <= _MAX_PORT:
                    raise ValueError(f"there is no port {port}: only 1 to {_MAX_PORT}")
        return options

    @field_validator("disk_size")
    @classmethod
    def _can_be_sized(cls, size: int | str, info: ValidationInfo) -> int | str:
        options = info.data.get("options")
        if size != "guess" and options is not None and not set(SNAPSHOT) & set(options):
            raise ValueError(f"without {SNAPSHOT[0]} in `options` the disk is the image's own file, which is not made larger")
        return size


def childhurd_forwards(number: int | None) -> dict[int, int]:
    """Host port -> guest port for secrets, SSH and VNC, by id (Guix's manual, *hurd-vm-configuration*)."""
    step = 1000 * (number or 0)
    return {11004 + step: SECRETS_PORT, 10022 + step: SSH_PORT, 15900 + step: VNC_PORT}


def _net_forwards(options: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(host port, guest port) of QEMU's arguments."""
    return tuple((int(match[2]), int(match[3])) for match in HOST_FORWARD.finditer(" ".join(options)))
