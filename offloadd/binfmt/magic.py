"""How the kernel tells the programs of one system type from all others: the beginning of their ELF header.

Made from the fields of the ELF header (elf.h, elf(5)); nothing is listed but the number of each machine.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from offloadd.model.system import SYSTEMS, System

_ELFCLASS = {32: 1, 64: 2}
_ELFDATA = {"little": 1, "big": 2}
_EV_CURRENT = 1
ET_EXEC, ET_DYN = 2, 3

MACHINES = {
    "i686-linux": 3,  # EM_386
    "mips64el-linux": 8,  # EM_MIPS
    "powerpc64le-linux": 21,  # EM_PPC64
    "s390x-linux": 22,  # EM_S390
    "armhf-linux": 40,  # EM_ARM
    "x86_64-linux": 62,  # EM_X86_64
    "aarch64-linux": 183,  # EM_AARCH64
    "riscv64-linux": 243,  # EM_RISCV
    "loongarch64-linux": 258,  # EM_LOONGARCH
}
"""e_machine of every Linux system."""


@dataclass(frozen=True)
class Magic:
    """Bytes at the beginning of a file, and which of their bits count."""

    magic: bytes
    mask: bytes
    offset: int = 0
    """Where they begin."""

    def matches(self, header: bytes) -> bool:
        """Whether a file that begins with `header` is meant."""
        part = header[self.offset : self.offset + len(self.magic)]
        if len(part) < len(self.magic):
            return False
        return all((have ^ want) & bits == 0 for have, want, bits in zip(part, self.magic, self.mask, strict=True))


def find_magic(system: str) -> Magic:
    """What the programs of a Linux system type begin with.

    Only what Linux itself looks at before it runs a program counts: the ABI of an operating system (EI_OSABI, EI_ABIVERSION)
    and the padding do not.  A program is ET_EXEC, or ET_DYN when it is position-independent: they differ in one bit.

    Raises:
        KeyError: `system` is not one of Linux.
    """
    magic = elf_header(system, ET_EXEC)
    endian = SYSTEMS[system].endian
    ident = b"\xff" * 7 + b"\0" * 9
    return Magic(magic, ident + (ET_EXEC ^ ET_DYN ^ 0xFFFF).to_bytes(2, endian) + b"\xff\xff")


def elf_header(system: str, kind: int, abi: Literal[0, 3] = 0) -> bytes:
    """The first 20 bytes of a program: e_ident, e_type (`kind`) and e_machine; `abi` is EI_OSABI: 0 System V, 3 GNU.

    Raises:
        KeyError: `system` is not one of Linux.
    """
    facts: System = SYSTEMS[system]
    ident = bytes([0x7F, *b"ELF", _ELFCLASS[facts.bits], _ELFDATA[facts.endian], _EV_CURRENT, abi]).ljust(16, b"\0")
    return ident + struct.pack("<HH" if facts.endian == "little" else ">HH", kind, MACHINES[system])
