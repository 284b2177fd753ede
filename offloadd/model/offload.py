"""What a build hook asks for, on behalf of guix-daemon or nix-daemon."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from offloadd.model.base import Text, Value
from offloadd.model.machine import BuildDaemon


class OffloadRequest(Value):
    """One derivation that wants a machine."""

    daemon: BuildDaemon
    system: Text
    """Any: build daemons know more system types than we do."""
    features: Annotated[tuple[str, ...], Field(strict=False, max_length=1000)] = ()
    """What the derivation requires."""
    local: bool = False
    """Whether the build daemon could build it itself now."""
    keys: Annotated[dict[str, Text], Field(max_length=10_000, default_factory=dict)]
    """Machine -> the file with a copy of its client key, for a build daemon that cannot read ours."""
