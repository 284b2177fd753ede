"""System types, in Guix's and Nix's spelling.

Sources: Guix's `%supported-systems` and Nix's system types for the names; config.sub and dpkg (cputable, tupletable) for
triplets and Debian's names; QEMU's `configure --help` for its targets.  Nothing else in offload knows any of this.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator


@dataclass(frozen=True, kw_only=True)
class System:
    """One system type."""

    name: str
    triplet: str
    """GNU's, without a vendor, as dpkg writes it."""
    debian: str
    """dpkg's name of the architecture."""
    qemu: str
    """QEMU's full-system target: the binary is `qemu-system-<qemu>`."""
    user: str | None
    """QEMU's user-mode target: the binary is `qemu-<user>`; None where there is none, as for the Hurd."""
    bits: Literal[32, 64]
    """Word size."""
    endian: Literal["little", "big"] = "little"
    aliases: tuple[str, ...] = ()
    """Further names, beside `debian` and `triplet`."""

    @property
    def short(self) -> str:
        """Its name without the kernel, when that is Linux: `aarch64`."""
        return self.name.removesuffix("-linux")

    @property
    def kernel(self) -> Literal["linux", "gnu"]:
        """`gnu` is the Hurd."""
        return "linux" if self.name.endswith("-linux") else "gnu"


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System(name="x86_64-linux", triplet="x86_64-linux-gnu", debian="amd64", qemu="x86_64", user="x86_64", bits=64),
        # A 32-bit x86 guest also runs under qemu-system-x86_64, which every host of ours has.
        System(
            name="i686-linux",
            triplet="i686-linux-gnu",
            debian="i386",
            qemu="x86_64",
            user="i386",
            bits=32,
            aliases=("i386-linux-gnu", "i586-linux-gnu", "i386-linux", "i586-linux"),
        ),
        System(name="aarch64-linux", triplet="aarch64-linux-gnu", debian="arm64", qemu="aarch64", user="aarch64", bits=64),
        System(
            name="armhf-linux",
            triplet="arm-linux-gnueabihf",
            debian="armhf",
            qemu="arm",
            user="arm",
            bits=32,
            aliases=("armv7l-linux", "armv7l-linux-gnueabihf"),
        ),
        System(name="riscv64-linux", triplet="riscv64-linux-gnu", debian="riscv64", qemu="riscv64", user="riscv64", bits=64),
        System(
            name="powerpc64le-linux",
            triplet="powerpc64le-linux-gnu",
            debian="ppc64el",
            qemu="ppc64",
            user="ppc64le",
            bits=64,
            aliases=("ppc64le-linux",),
        ),
        System(
            name="s390x-linux", triplet="s390x-linux-gnu", debian="s390x", qemu="s390x", user="s390x", bits=64, endian="big"
        ),
        System(
            name="mips64el-linux",
            triplet="mips64el-linux-gnuabi64",
            debian="mips64el",
            qemu="mips64el",
            user="mips64el",
            bits=64,
            aliases=("mips64el-linux-gnu",),
        ),
        System(
            name="loongarch64-linux",
            triplet="loongarch64-linux-gnu",
            debian="loong64",
            qemu="loongarch64",
            user="loongarch64",
            bits=64,
        ),
        System(
            name="i586-gnu",
            triplet="i686-gnu",
            debian="hurd-i386",
            # As above; and the Hurd does not come up in qemu-system-i386 ("Bad ram pointer").
            qemu="x86_64",
            user=None,
            bits=32,
            aliases=("i586-pc-gnu", "i686-pc-gnu", "i386-gnu"),
        ),
        System(name="x86_64-gnu", triplet="x86_64-gnu", debian="hurd-amd64", qemu="x86_64", user=None, bits=64),
    )
}

_BY_NAME = {
    name: system.name
    for system in SYSTEMS.values()
    for name in (system.name, system.short, system.debian, system.triplet, *system.aliases)
}
_VENDOR = re.compile(r"^([^-]+)-(?:pc|unknown)-")


def find_system(name: str) -> System:
    """The system type called `name`: its own name, Debian's architecture (`arm64`), or a GNU triplet.

    Raises:
        ValueError: there is none, with the nearest names.
    """
    wanted = name.strip().lower()
    found = _BY_NAME.get(wanted) or _BY_NAME.get(_VENDOR.sub(r"\1-", wanted))
    if found is None:
        raise ValueError(f"unknown system type {name!r}: {_nearest_system(wanted)}")
    return SYSTEMS[found]


def _nearest_system(name: str) -> str:
    close = difflib.get_close_matches(name, _BY_NAME, n=4, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(_BY_NAME[item] for item in close))}?"
    return f"known: {', '.join(SYSTEMS)}"


def _normal(name: str) -> str:
    return find_system(name).name


SystemName = Annotated[str, AfterValidator(_normal)]
"""The name of a system type in a value that is read from YAML or from the API; aliases become the name itself."""


def nearest(name: str, known: object) -> str:
    """A hint that names what `name` may have meant."""
    names = [str(item) for item in known]  # type: ignore[attr-defined]
    lowered = {item.lower(): item for item in names}
    close = [lowered[item] for item in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(sorted(names))}" if names else "there is none"
