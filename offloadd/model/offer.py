"""A machine as build daemons are told of it."""

from __future__ import annotations

from typing import Literal

from offloadd.model.base import Name, Value
from offloadd.model.machine import BuildDaemon, Port
from offloadd.model.system import SystemName

OfferState = Literal["running", "starting", "stopped"]


class Offer(Value):
    """What guix-daemon and nix-daemon have to know to log in; fields as in Guix's record *build-machine* where it has them."""

    machine: Name
    """Its name here; two may have the same `host`."""
    host: str
    """What is connected to: Guix's `name`."""
    port: Port
    user: str
    host_key: str
    """`TYPE BASE64`, without a comment."""
    private_key: str
    """The absolute path of the file with the client's key."""
    systems: tuple[SystemName, ...]
    parallel_builds: int
    speed: float
    features: tuple[str, ...]
    overload_threshold: float | None
    daemons: tuple[BuildDaemon, ...]
    state: OfferState
    """`stopped`: it is started when a build needs it.  A remote host is always taken to run."""
