"""CPU models by the date of their release.

Sources: for x86 Intel's product database (ark.intel.com, "Launch Date" of the first product of the generation) and AMD's
launch announcement of the Opteron (2003-04-22); for the others the vendors' announcements of the first core or machine.  The
names are QEMU's (`-cpu help`).  Guix's table (gnu/services/virtualization.scm) begins with core2duo; builds from
before 2006 get the first 64-bit x86.

A table has what Debian runs on and what the target's machine takes (`plan/target.py`): Debian's ppc64el begins with POWER8, and
QEMU's `virt` of 32-bit Arm takes the Cortex-A15 (ARM's announcement) and the A7, which has the same instructions.  Under TCG no
model of IBM Z can be had by its name: each since the z9 has decimal floating point, which TCG has not.  So there it is always
`max`, all that QEMU has.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, date, datetime

from offloadd.errors import NoMachineError
from offloadd.model.system import SYSTEMS, nearest

# Oldest first; within an architecture a later entry is the newer model.
_X86 = (
    (date(2003, 4, 22), "Opteron_G1"),
    (date(2006, 7, 27), "core2duo"),
    (date(2008, 11, 17), "Nehalem"),
    (date(2010, 1, 7), "Westmere"),
    (date(2011, 1, 9), "SandyBridge"),
    (date(2012, 4, 29), "IvyBridge"),
    (date(2013, 6, 4), "Haswell"),
    (date(2014, 10, 27), "Broadwell"),
    (date(2015, 8, 5), "Skylake-Client"),
    (date(2017, 7, 11), "Skylake-Server"),
    (date(2019, 4, 2), "Cascadelake-Server"),
    (date(2020, 6, 18), "Cooperlake"),
    (date(2021, 4, 6), "Icelake-Server"),
    (date(2023, 1, 10), "SapphireRapids"),
    (date(2024, 6, 4), "SierraForest"),
    (date(2024, 9, 24), "GraniteRapids"),
)
MODELS: dict[str, tuple[tuple[date, str], ...]] = {
    "x86_64": _X86,
    "aarch64": (
        (date(2012, 10, 30), "cortex-a57"),
        (date(2015, 2, 3), "cortex-a72"),
        (date(2018, 5, 31), "cortex-a76"),
        (date(2019, 2, 20), "neoverse-n1"),
        (date(2020, 9, 22), "neoverse-v1"),
        (date(2021, 5, 25), "cortex-a710"),
    ),
    "arm": ((date(2010, 9, 8), "cortex-a15"),),
    "ppc64": (
        (date(2014, 6, 10), "power8"),
        (date(2017, 12, 5), "power9"),
        (date(2021, 9, 8), "power10"),
    ),
    "s390x": ((date(2000, 10, 3), "max"),),
    "riscv64": ((date(2018, 2, 3), "rv64"),),
}


def choose_cpu(moment: datetime, system: str, known: Collection[str]) -> str:
    """The newest model released before `moment` that this QEMU knows.

    A date before the first model gets the first one: nothing older runs this architecture.

    Args:
        known: the names that this QEMU has.
    Raises:
        NoMachineError: this QEMU knows none of the table's models.
    """
    table = [(day, model) for day, model in MODELS.get(SYSTEMS[system].qemu, ()) if model in known]
    if not table:
        raise NoMachineError(f"this QEMU knows no CPU model of {system} by date", hint="set `cpu` in the machine's file")
    day = moment.astimezone(UTC).date()
    released = [model for launch, model in table if launch < day]
    return released[-1] if released else table[0][1]


def check_cpu(cpu: str, known: Collection[str], qemu: str) -> None:
    """Raise `NoMachineError` with the nearest names when QEMU does not know the model; in `Haswell,-avx2` that is Haswell."""
    model = cpu.split(",", 1)[0]
    if model not in known:
        raise NoMachineError(f"{qemu} does not know the CPU model {model!r}", hint=nearest(model, known))
