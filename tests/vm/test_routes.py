"""One build on all routes, and from one route to another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import World

ROUTES = {
    "local": "x86_64-linux",
    "build-vm": "x86_64-linux",
    "binfmt": "aarch64-linux",
    "emulated-aarch64": "aarch64-linux",
}

# Only what every environment has.  The order of files, times, owners and the width of numbers are where builds differ.
STEPS = [
    'mkdir -p made/many && for i in $(seq 1 200); do echo "line $i" > made/many/$i; done',
    "perl -e 'printf(\"%.17g %s\\n\", sqrt($_), join(q( ), sort map { $_ * 7919 % 1009 } 1..50)) for 1..100' > made/numbers",
    "find made -exec touch -d @1000000000 {} +",
    "tar --sort=name --owner=0 --group=0 --numeric-owner -cf - made | gzip -n9 > made.tar.gz",
    "id > who; umask >> who; env -i sh -c 'echo $PWD' >> who",
    "stat -c '%A %u %g %n' /build /tmp /usr >> who; hostname >> who || true",
    "(cd / && find etc usr/bin -type f -printf '%p %m %s %T@\\n' | LC_ALL=C sort | sha256sum) > root",
]


def build(world: World, out: Path, machine: str, system: str, recipe: Path, *options: str) -> dict[str, Any]:
    world.run("build", "--machine", machine, "-s", system, "-o", out, *options, recipe)
    result: dict[str, Any] = json.loads((out / "build.json").read_text())
    return result


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("build.json", "build.log")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.usefixtures("binfmt")
def test_one_recipe_on_all_routes(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("everywhere", f"steps: {json.dumps(STEPS)}\noutputs: [made.tar.gz, who, root]\n")
    results = {machine: build(world, tmp_path / machine, machine, system, recipe) for machine, system in ROUTES.items()}
    made = {machine: content(tmp_path / machine) for machine in ROUTES}

    assert {machine: result["kind"] for machine, result in results.items()} == {
        "local": "local",
        "build-vm": "build-vm",
        "binfmt": "binfmt",
        "emulated-aarch64": "emulated-vm",
    }
    # The same root on two routes, down to the last byte that is made in it ...
    assert results["local"]["environment"] == results["build-vm"]["environment"]
    assert results["binfmt"]["environment"] == results["emulated-aarch64"]["environment"]
    assert made["local"] == made["build-vm"]
    assert made["binfmt"] == made["emulated-aarch64"]
    # ... and on all four, where it does not depend on the architecture's programs.
    for name in ("made.tar.gz", "who"):
        assert len({files[name] for files in made.values()}) == 1, name
    assert set(made["local"]) == {"made.tar.gz", "who", "root"}
    # Kernels and clocks are what differs.
    assert results["local"]["kernel"] != results["build-vm"]["kernel"]
    assert results["build-vm"]["clock"] < 1577836800 + 600 < results["local"]["clock"]
    world.assert_nothing_left()


# qemu-user has no io_uring: a program that cannot do without dies, as others die of what it does wrong.
NEEDS_A_KERNEL = "perl -e 'syscall(425, 0, 0); kill SEGV => $$ if $! == 38; print qq(has io_uring\\n)'"


@pytest.mark.usefixtures("binfmt")
def test_what_the_emulator_cannot_do_goes_to_a_full_vm(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("ringing", f"steps: [{json.dumps(NEEDS_A_KERNEL)}]\n")
    done = world.run("build", "-s", "arm64", "-o", tmp_path / "out", recipe)

    result = json.loads((tmp_path / "out/build.json").read_text())
    assert (result["machine"], result["state"]) == ("emulated-aarch64", "succeeded")
    assert "uncaught target signal 11" in result["retried"]
    assert "trying once more" in done.stderr
    assert "has io_uring" in done.stdout

    (quirk,) = world.json("quirks", "list")
    assert (quirk["name"], quirk["system"]) == ("ringing", "aarch64-linux")
    decision = world.json("route", "arm64", recipe)
    assert decision["machine"] == "emulated-aarch64"
    assert "uncaught target signal 11" in decision["passed_over"]["binfmt"]

    world.run("quirks", "forget", "ringing")
    assert world.json("route", "arm64", recipe)["machine"] == "binfmt"


@pytest.mark.usefixtures("binfmt")
def test_an_ordinary_failure_stays_where_it_is(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("failing", "steps: ['echo assertion failed; exit 1']\n")
    world.run("build", "-s", "arm64", "-o", tmp_path / "out", recipe, status=1)

    result = json.loads((tmp_path / "out/build.json").read_text())
    assert (result["machine"], result["state"]) == ("binfmt", "failed")
    assert "retried" not in result
    assert world.json("quirks", "list") == []
