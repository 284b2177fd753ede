"""What a build's `offload.yaml` declares, and the request that it becomes."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from offloadd.model.base import BuildDate, Date, Duration, Feature, Name, Size, Text, Value, quoted_text
from offloadd.model.image import Package, Suite
from offloadd.model.system import SystemName

Version = Annotated[str, BeforeValidator(quoted_text), StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+~:_-]{0,63}$")]
"""Becomes a part of the build directory's name."""
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
DebianName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]{1,63}$")]
DebianVersion = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.+:~-]{1,63}$")]
DEFAULT_SUITE = "bookworm"


class Source(Value):
    """What is fetched on the host, checked, and put into the build directory under its own name."""

    url: Text | None = None
    pypi: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$")] | None = None
    """`NAME==VERSION`: the source distribution, from the package index that pip is set up for."""
    debian: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?$")] | None = None
    """`NAME` or `NAME=VERSION`: the files of a Debian source package of the recipe's suite, checked as apt does."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if sum(place is not None for place in (self.url, self.pypi, self.debian)) != 1:
            raise ValueError("give one of url, pypi and debian")
        if self.url is not None and not self.url.startswith(("https://", "http://")):
            raise ValueError("url must begin with https:// or http://")
        if self.debian is None and self.sha256 is None:
            raise ValueError("sha256 is missing: what is fetched must be known")
        if self.debian is not None and self.sha256 is not None:
            raise ValueError("sha256 is not for Debian sources: apt's signed index has the digests")
        return self


class Requirements(Value):
    """What a build asks of its machine, beside its system type."""

    cpu: Text | None = None
    """A CPU model in QEMU's words: needs a VM."""
    kernel: Annotated[str, StringConstraints(pattern=r"^[0-9][A-Za-z0-9.+~_-]*$"), BeforeValidator(quoted_text)] | None = None
    """What the version of the kernel begins with, e.g. `"6.1"`: needs a VM."""
    features: Annotated[tuple[Feature, ...], Field(strict=False)] = ()
    """Labels that the machine must have."""
    network: bool = False
    """Whether the steps need the network; by default there is only loopback."""
    memory_size: Annotated[int, Field(ge=1)] | None = None
    """MiB that the machine must have."""
    disk_size: Size | None = None
    """Bytes that must be free where it builds."""
    timeout: Duration | None = None
    max_silent_time: Duration | None = None


class BuildRecipe(Requirements):
    """An `offload.yaml`."""

    name: Name
    version: Version = "0"
    suite: Suite = DEFAULT_SUITE
    """The Debian suite of the environment."""
    packages: Annotated[tuple[Package, ...], Field(strict=False)] = ()
    """What the environment has beside the essential packages."""
    sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    steps: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """Shell commands, run one after the other in the build directory; the first that fails ends the build."""
    outputs: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Patterns, relative to the build directory, of what is brought back."""
    env: dict[EnvName, Text] = Field(default={})
    date: BuildDate | None = None
    systems: Annotated[tuple[SystemName, ...], Field(strict=False)] = ()
    """Those that it can be built for; none: any."""

    @field_validator("outputs")
    @classmethod
    def _outputs_stay_inside(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in outputs:
            path = PurePosixPath(pattern)
            if not pattern or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{pattern!r} leaves the build directory")
        return outputs


class DebianBuild(Requirements):
    """A Debian source package that is built as sbuild would."""

    package: DebianName
    version: DebianVersion | None = None
    """None: the newest that the suite has."""
    suite: Suite = DEFAULT_SUITE
    dsc: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+~_-]*\.dsc$")] | None = None
    """The name of the .dsc among the files that come with the request; None: fetched from the suite."""
    build_options: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9=.,+-]*$")], ...], Field(strict=False)
    ] = ()
    """Words of DEB_BUILD_OPTIONS."""
    check: bool = True
    """Whether the package's own tests run."""


class Released(Value):
    """What whoever has the source says of its age."""

    date: Date
    origin: Text
    """Where that is written: `the last commit`, `debian/changelog`."""


class BuildRequest(Value):
    """One request as it crosses the API: what is built, and what the caller asked for beside it."""

    recipe: BuildRecipe | None = None
    debian: DebianBuild | None = None
    system: SystemName | None = None
    """None: the host's own when the recipe allows it, else the first that it names."""
    machine: Name | None = None
    """Nobody else may take it."""
    prefer: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Names or kinds of machines that are taken first of those that can, in this order."""
    date: BuildDate | None = None
    released: Released | None = None
    """Of the directory that is sent, for the date `auto`; sources that are fetched come before it."""
    cpu: Text | None = None
    timeout: Duration | None = None
    max_silent_time: Duration | None = None
    keep_failed: bool = False
    keep_machine: bool = False
    """Build in the machine that runs for its user, and leave it running."""

    @model_validator(mode="after")
    def _one_work(self) -> BuildRequest:
        if (self.recipe is None) == (self.debian is None):
            raise ValueError("give one of recipe and debian")
        return self

    @property
    def work(self) -> BuildRecipe | DebianBuild:
        """What is built."""
        work = self.recipe or self.debian
        assert work is not None
        return work

    @property
    def name(self) -> str:
        """What the build is called."""
        work = self.work
        return work.name if isinstance(work, BuildRecipe) else work.package

    @property
    def version(self) -> str:
        return self.work.version or ""

    @property
    def asked_date(self) -> datetime | Literal["auto"] | None:
        """The date that the build wants; None means that the machine's own will do."""
        return self.date or (self.recipe.date if self.recipe else None)

    @property
    def asked_cpu(self) -> str | None:
        return self.cpu or self.work.cpu

    @property
    def timeout_s(self) -> float | None:
        return self.timeout or self.work.timeout

    @property
    def max_silent_s(self) -> float | None:
        return self.max_silent_time or self.work.max_silent_time

    def choose_system(self, native: str) -> str:
        """The system type to build for, on a host of type `native` (empty: of none that is known).

        Raises:
            ValueError: the recipe is not for the one that was asked for, or nothing says which.
        """
        allowed = self.recipe.systems if self.recipe else ()
        if self.system is None:
            if not (native or allowed):
                raise ValueError("the system type of this host is not known: give one")
            return native if native in allowed or not allowed else allowed[0]
        if allowed and self.system not in allowed:
            raise ValueError(f"the recipe is for {', '.join(allowed)}, not {self.system}")
        return self.system
