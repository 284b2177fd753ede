"""Builds on this host against bubblewrap and qemu-user by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from bench.measure import BenchError, Budget, Row, Series, in_turn, time_program
from bench.workplace import Workplace
from offloadd.process import Progress

FOREIGN = "aarch64-linux"
# Half a minute of processor time under emulation: less would measure the way there, not the emulation.
_COUNT = "i=0; while [ $i -lt 2000000 ]; do i=$((i+1)); done"
_UNREGISTERED = re.compile(r"qemu-\S+ is not registered.*")


def measure_local(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """A build that does nothing, against a sandbox that does nothing."""
    tell("making the environment", None)
    root = _root(place, "local")
    argv = _bwrap(root, "true")
    build, bare = Series("offload build --machine local"), Series("bwrap ... true")
    for number in budget.rounds():
        for name in in_turn(number, "build", "bwrap"):
            tell(f"round {number + 1}, {name}", None)
            if name == "build":
                build.seconds.append(_build(place, "local", "one-line"))
            else:
                bare.seconds.append(time_program(argv))
    return [
        Row(
            name="no-op build on this host",
            compares="`offload build` of a one-line recipe, from the shell and back : `bwrap ... true` in the same root",
            ours=build,
            base=bare,
            relation="difference",
            target=0.3,
        )
    ]


def measure_binfmt(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """The same command under qemu-user, by us and by hand."""
    folder = place.folder / "count"
    folder.mkdir()
    (folder / "offload.yaml").write_text(f"name: count\nversion: '1'\nsteps: ['{_COUNT}']\n")
    build, bare = Series("offload build --machine binfmt"), Series("bwrap ... under qemu-user")
    row = Row(
        name="build under qemu-user",
        compares=f"`offload build -s {FOREIGN}` of a counting loop : the same loop in `bwrap` by hand",
        ours=build,
        base=bare,
        relation="ratio",
        target=1.1,
    )
    tell(f"making the environment of {FOREIGN}", None)
    try:
        root = _root(place, "binfmt", "-s", FOREIGN)
    except BenchError as exc:
        missing = _UNREGISTERED.search(str(exc))
        if missing is None:
            raise
        return [replace(row, why_not=missing[0])]
    argv = _bwrap(root, _COUNT)
    for number in budget.rounds():
        for name in in_turn(number, "build", "bwrap"):
            tell(f"round {number + 1}, {name}", None)
            if name == "build":
                build.seconds.append(_build(place, "binfmt", "count", "-s", FOREIGN))
            else:
                bare.seconds.append(time_program(argv))
    return [row]


def _build(place: Workplace, machine: str, project: str, *options: str) -> float:
    arguments = ("--machine", machine, "-o", str(place.folder / "out"), *options, str(place.folder / project))
    return place.run("build", *arguments, limit_s=900)


def _root(place: Workplace, machine: str, *options: str) -> Path:
    """The environment of the one-line recipe, unpacked; made by the first build."""
    _build(place, machine, "one-line", *options)
    result = json.loads((place.folder / "out/build.json").read_text())
    root = place.paths.cache / "roots" / str(result["environment"]) / "root"
    if not root.is_dir():
        raise BenchError(f"no unpacked environment in {root}")
    return root


def _bwrap(root: Path, command: str) -> list[str]:
    sandbox = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", str(root), "/", "--proc", "/proc", "--dev", "/dev"]
    return [*sandbox, "--", "/bin/sh", "-e", "-c", command]
