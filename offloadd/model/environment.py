"""What a caller asks for when it wants an environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from offloadd.model.base import Value
from offloadd.model.image import Package, Suite
from offloadd.model.recipe import DEFAULT_SUITE
from offloadd.model.system import SystemName


class EnvironmentRequest(Value):
    """An environment: one that was made, by its digest, or one to be made."""

    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,64}$")] | None = None
    """What its digest begins with."""
    suite: Suite = DEFAULT_SUITE
    system: SystemName | None = None
    """None: this host's own."""
    packages: Annotated[tuple[Package, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _one_way(self) -> EnvironmentRequest:
        if self.digest is not None and (self.system is not None or self.packages):
            raise ValueError("a digest says what the system type and the packages are")
        return self
