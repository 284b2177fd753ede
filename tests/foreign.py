"""Programs of other architectures, written by hand: small static ELF files, so that no cross compiler is needed."""

from __future__ import annotations

import struct
from pathlib import Path

from offloadd.binfmt.magic import ET_EXEC, elf_header
from offloadd.model.system import SYSTEMS

_BASE = 0x400000
_FLAGS = {"armhf-linux": 0x05000400, "powerpc64le-linux": 2, "riscv64-linux": 5}
"""e_flags: EABI 5 with hard float; ELFv2; RVC with double float."""

EXIT_42: dict[str, bytes] = {
    # mov x0, #42; mov x8, #93; svc #0
    "aarch64-linux": struct.pack("<3I", 0xD2800540, 0xD2800BA8, 0xD4000001),
    # mov r0, #42; mov r7, #1; svc #0
    "armhf-linux": struct.pack("<3I", 0xE3A0002A, 0xE3A07001, 0xEF000000),
    # lghi %r2, 42; svc 1
    "s390x-linux": bytes.fromhex("a729002a 0a01"),
    # li a0, 42; li a7, 93; ecall
    "riscv64-linux": struct.pack("<3I", 0x02A00513, 0x05D00893, 0x00000073),
    # li r3, 42; li r0, 1; sc
    "powerpc64le-linux": struct.pack("<3I", 0x3860002A, 0x38000001, 0x44000002),
}
"""Code that ends with status 42."""

# ldr x1, [sp, #8]; mov x0, #1; mov x2, #5; mov x8, #64; svc #0
PRINT_5_OF_ARGV0 = struct.pack("<5I", 0xF94007E1, 0xD2800020, 0xD28000A2, 0xD2800808, 0xD4000001)
"""aarch64: write the first five bytes of argv[0] to standard output, and go on."""
# udf #0
ILLEGAL = struct.pack("<I", 0)
"""aarch64: an instruction that is none."""
# mov x0, #0; ldr x0, [x0]
SEGFAULT = struct.pack("<2I", 0xD2800000, 0xF9400000)
"""aarch64: read what is not there."""


def write_program(path: Path, system: str, code: bytes) -> Path:
    """An executable of one segment that runs `code`."""
    facts = SYSTEMS[system]
    order = "<" if facts.endian == "little" else ">"
    wide = facts.bits == 64
    header_size, segment_size = (64, 56) if wide else (52, 32)
    start = header_size + segment_size
    size = start + len(code)
    word = "Q" if wide else "I"
    header = elf_header(system, ET_EXEC) + struct.pack(
        f"{order}I3{word}I6H", 1, _BASE + start, header_size, 0, _FLAGS.get(system, 0), header_size, segment_size, 1, 0, 0, 0
    )
    if wide:
        segment = struct.pack(f"{order}2I6Q", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    else:
        segment = struct.pack(f"{order}8I", 1, 0, _BASE, _BASE, size, size, 5, 0x10000)
    path.write_bytes(header + segment + code)
    path.chmod(0o755)
    return path
