"""What a build's `offload.yaml` declares, and the request that it becomes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from offloadd.model.base import Date, Duration, Name, Text, Value, quoted_text
from offloadd.model.image import Package, Suite
from offloadd.model.system import SystemName

Version = Annotated[str, BeforeValidator(quoted_text), StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+~:_-]{0,63}$")]
"""Becomes a part of the build directory's name."""
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Source(Value):
    """A file that is fetched on the host, checked, and put into the build directory under its own name."""

    url: Text | None = None
    pypi: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$")] | None = None
    """`NAME==VERSION`: the source distribution, from the package index that pip is set up for."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.url is None) == (self.pypi is None):
            raise ValueError("give one of url and pypi")
        if self.url is not None and not self.url.startswith(("https://", "http://")):
            raise ValueError("url must begin with https:// or http://")
        return self


class BuildRecipe(Value):
    """An `offload.yaml`."""

    name: Name
    version: Version = "0"
    suite: Suite = "bookworm"
    """The Debian suite of the environment."""
    packages: Annotated[tuple[Package, ...], Field(strict=False)] = ()
    """What the environment has beside the essential packages."""
    sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    steps: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """Shell commands, run one after the other in the build directory; the first that fails ends the build."""
    outputs: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Patterns, relative to the build directory, of what is brought back."""
    env: dict[EnvName, Text] = Field(default={})
    date: Date | None = None
    cpu: Text | None = None
    systems: Annotated[tuple[SystemName, ...], Field(strict=False, min_length=1)] = ("x86_64-linux",)
    timeout: Duration | None = None
    max_silent_time: Duration | None = None

    @field_validator("outputs")
    @classmethod
    def _outputs_stay_inside(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in outputs:
            path = PurePosixPath(pattern)
            if not pattern or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{pattern!r} leaves the build directory")
        return outputs


class BuildRequest(Value):
    """One request as it crosses the API: the recipe, and what the caller asked for beside it."""

    recipe: BuildRecipe
    machine: Name | None = None
    date: Date | None = None
    cpu: Text | None = None
    timeout: Duration | None = None
    max_silent_time: Duration | None = None
    keep_failed: bool = False

    @property
    def asked_date(self) -> Date | None:
        """The date that the build wants; None means that the machine's own will do."""
        return self.date or self.recipe.date

    @property
    def asked_cpu(self) -> str | None:
        return self.cpu or self.recipe.cpu

    @property
    def timeout_s(self) -> float | None:
        return self.timeout or self.recipe.timeout

    @property
    def max_silent_s(self) -> float | None:
        return self.max_silent_time or self.recipe.max_silent_time
