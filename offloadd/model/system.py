"""System types, in Guix's and Nix's spelling.

The GNU triplets are those of config.sub, the Debian names those of dpkg's cputable and ostable, the targets QEMU's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator


@dataclass(frozen=True, kw_only=True)
class System:
    """One system type."""

    name: str
    triplet: str
    debian: str
    qemu: str
    """QEMU's full-system target: the binary is `qemu-system-<qemu>`."""
    bits: int


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System(name="x86_64-linux", triplet="x86_64-linux-gnu", debian="amd64", qemu="x86_64", bits=64),
        # A 32-bit x86 guest also runs under qemu-system-x86_64, which every host of ours has.
        System(name="i686-linux", triplet="i686-linux-gnu", debian="i386", qemu="x86_64", bits=32),
        System(name="aarch64-linux", triplet="aarch64-linux-gnu", debian="arm64", qemu="aarch64", bits=64),
        System(name="armhf-linux", triplet="arm-linux-gnueabihf", debian="armhf", qemu="arm", bits=32),
        System(name="riscv64-linux", triplet="riscv64-linux-gnu", debian="riscv64", qemu="riscv64", bits=64),
        System(name="powerpc64le-linux", triplet="powerpc64le-linux-gnu", debian="ppc64el", qemu="ppc64", bits=64),
        System(name="s390x-linux", triplet="s390x-linux-gnu", debian="s390x", qemu="s390x", bits=64),
    )
}


def _known(name: str) -> str:
    if name not in SYSTEMS:
        raise ValueError(f"unknown system type {name!r}: {nearest(name, SYSTEMS)}")
    return name


SystemName = Annotated[str, AfterValidator(_known)]
"""The name of a system type, in a value that is read from YAML or from the API."""


def nearest(name: str, known: object) -> str:
    """A hint that names what `name` may have meant."""
    names = [str(item) for item in known]  # type: ignore[attr-defined]
    lowered = {item.lower(): item for item in names}
    close = [lowered[item] for item in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(sorted(names))}" if names else "there is none"
