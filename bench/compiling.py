"""The same compile in a VM of ours and in one of plain QEMU, by the guest's own clock: what our command line costs, or saves.

Both have the same kernel, environment, accelerator, CPU model, processors and memory.  Ours is a build like any other; plain
QEMU boots the disk of the systemd image with `-snapshot` and a shell as its init, which enters the environment with chroot.
Ours tells its kernel a few things that make it faster, so the strict comparison tells plain QEMU's the same.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from bench.measure import BenchError, Budget, Row, Series
from bench.others import plain_argv
from bench.program import time_to_lines
from bench.stock import Stock, open_stock
from bench.ways import Point, Way, go_in_turn, way_rows
from bench.workplace import MACHINE, Workplace
from offloadd.nursery import narrow
from offloadd.process import Progress

LIMIT_S = 300.0
FUNCTIONS = 40
TIMES = 3
"""The shortest of these counts: a few seconds in which nobody else wants the processors are found more often than many."""
TARGET = 1.03
TOLD = "mitigations=off norandmaps lsm=landlock,lockdown,yama psi=0"
# The compiler is read from its disk before the time is taken.  /proc/uptime has hundredths of a second, whatever the date is.
SCRIPT = f"""\
echo 'int main(void) {{ return 0; }}' >small.c
gcc -O2 -S -o /dev/null small.c
for number in $(seq {TIMES}); do
    read -r began _ </proc/uptime
    gcc -O2 -S -o /dev/null big.c
    read -r ended _ </proc/uptime
    echo "offload-bench: compiled $began $ended"
done
"""
_RECIPE = """\
name: compile
version: "1"
packages: [gcc]
steps: ["sh -eu script >took"]
outputs: [took]
"""
_INIT = "mount -t tmpfs tmp /tmp && cd /tmp && tar -x -f /dev/vdc && exec sh -eu init"
_ENTER = """\
modprobe squashfs
mount -t squashfs -o ro /dev/vdb /mnt
mount -t tmpfs tmp /mnt/tmp
mount -t proc proc /mnt/proc
mount -o bind /dev /mnt/dev
cp script big.c /mnt/tmp
chroot /mnt sh -eu -c 'cd /tmp && exec sh -eu script'
exec sleep 1000
"""
_TOOK = re.compile(r"^offload-bench: compiled ([\d.]+) ([\d.]+)$", re.MULTILINE)


def measure_compile(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """The row."""
    try:
        return trio.run(_measure, place, budget, tell)
    except BaseExceptionGroup as group:
        raise narrow(group) from None


async def _measure(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    project = place.folder / "compile"
    await trio.to_thread.run_sync(write_project, project)
    said = "in the same environment under `qemu -snapshot` (same accelerator, -cpu, -smp, -m and kernel"
    told = f"told {TOLD} as ours is"
    base = Point(series=Series("plain QEMU, told the same"), what=f"the same {said}, {told})")
    default = Point(series=Series("compile under plain QEMU"), what=f"the same {said}, with its defaults)")
    ours = Point(
        series=Series("compile in a VM"),
        what=f"`gcc -O2 -S` of {FUNCTIONS} functions in a build, by the guest's clock, the shortest of {TIMES}",
        target=TARGET,
    )
    tell("making the environment", None)
    await _build(place, project)
    environment = await trio.to_thread.run_sync(_find_environment, place)
    tools = project.with_name("compile.tar")
    await trio.to_thread.run_sync(_write_tools, project, tools)
    async with open_stock(place, tell) as stock:

        async def build() -> Sequence[float]:
            return [await _build(place, project)]

        async def plain(words: str) -> Sequence[float]:
            return [await _run_plain(stock, environment, tools, words)]

        # It is by that clock that all of them are measured.
        clock = f"tsc_early_khz={stock.plan.qemu.tsc_khz} " if stock.plan.qemu.tsc_khz else ""
        ways = [
            Way(name="our VM", points=(ours,), go=build),
            Way(name="plain QEMU, told the same", points=(base,), go=partial(plain, f"{TOLD} {clock}")),
            Way(name="plain QEMU", points=(default,), go=partial(plain, clock)),
        ]
        await go_in_turn(ways, budget, tell)
    return way_rows(ways, base, drawn=False)


def write_project(folder: Path) -> None:
    """The recipe, the script, and a C file that is the same in every run and includes nothing."""
    folder.mkdir()
    (folder / "offload.yaml").write_text(_RECIPE)
    (folder / "script").write_text(SCRIPT)
    (folder / "init").write_text(_ENTER)
    (folder / "big.c").write_text("".join(_function(number) for number in range(FUNCTIONS)))


def _function(number: int) -> str:
    return f"""\
unsigned f{number}(unsigned *v, unsigned n) {{
    unsigned i, j, s = {number}u;
    for (i = 0; i < n; i++)
        for (j = i; j < n; j += 3)
            s = (s << {number % 13 + 1}) ^ v[j] * {number * 7 + 3}u + (s > v[i] ? v[i] / (j + 1) : s % (i + {number + 1}u));
    switch (s % 7) {{ case 0: return s + v[0]; case 1: return s * 3; case 4: return ~s; default: return s ^ {number}u; }}
}}
"""


async def _build(place: Workplace, project: Path) -> float:
    """A build in a VM of its own; how long the compile took in there."""
    out = place.folder / "compiled"
    options = ("build", "--machine", MACHINE, "-o", str(out), str(project))
    await trio.to_thread.run_sync(lambda: place.run(*options, limit_s=LIMIT_S))
    return read_took((out / "took").read_text())


def _find_environment(place: Workplace) -> Path:
    digest = json.loads((place.folder / "compiled/build.json").read_text())["environment"]
    found = [*(place.paths.cache / "environments" / str(digest)).glob("root.squashfs")]
    if len(found) != 1:
        raise BenchError(f"no disk of the environment {digest}")
    return found[0]


def _write_tools(project: Path, tools: Path) -> None:
    """A disk that is a tar file: QEMU takes whole sectors, and tar's blocks are such."""
    with tarfile.open(tools, "w") as archive:
        for name in ("init", "script", "big.c"):
            archive.add(project / name, name)


async def _run_plain(stock: Stock, environment: Path, tools: Path, words: str) -> float:
    argv = plain_argv(stock.plan, stock.systemd.boot, f'{words}init=/bin/sh -- -c "{_INIT}"', environment, tools)
    said: list[str] = []
    await time_to_lines(argv, [_TOOK] * TIMES, limit_s=LIMIT_S, heard=said)
    return read_took("\n".join(said))


def read_took(said: str) -> float:
    """The shortest time between the two that the script prints for each compile, in seconds.

    Raises:
        BenchError: it did not get to the last one.
    """
    found = _TOOK.findall(said)
    if len(found) != TIMES:
        raise BenchError(f"the compile said {said[-200:]!r}")
    return min(float(ended) - float(began) for began, ended in found)
