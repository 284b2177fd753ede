"""Debian source packages by name, for real: Debian's mirror, Debian's packages, Debian's tools."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.conftest import World

HELLO = {
    # system type: architecture, machine, word size
    "x86_64-linux": ("amd64", "local", 64),
    "i686-linux": ("i386", "local", 32),
    "aarch64-linux": ("arm64", "binfmt", 64),
}
LIMIT_S = 2400
"""A guard: where no environment is kept yet, one of a foreign architecture takes minutes."""
EXAMPLE = Path(__file__).parent.parent.parent / "examples/mbedtls/offload.yaml"


def record(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "build.json").read_text())
    return result


def control(deb: Path, field: str) -> str:
    """What the package says of itself."""
    done = subprocess.run(["dpkg-deb", "--field", deb, field], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def check(out: Path, name: str, architecture: str) -> None:
    """All that a build of a package gives is there and fits together."""
    (deb,) = out.glob(f"{name}_*_{architecture}.deb")
    assert (control(deb, "Package"), control(deb, "Architecture")) == (name, architecture)
    version = record(out)["version"]
    for kind in ("changes", "buildinfo"):
        (file,) = out.glob(f"*_{architecture}.{kind}")
        said = file.read_text()
        assert f"Version: {version}\n" in said
        assert deb.name in said
    log = (out / "build.log").read_text()
    assert "dpkg-buildpackage: info: binary-only upload" in log
    assert "dpkg-genbuildinfo" in log


@dataclass(frozen=True)
class Long:
    """Builds that take minutes, side by side: each alone would leave a core idle."""

    folder: Path
    hello: Future[CompletedProcess[str]]
    today: Future[CompletedProcess[str]]
    then: Future[CompletedProcess[str]]


@pytest.fixture(scope="module")
def long(world: World, binfmt: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Long]:
    folder = tmp_path_factory.mktemp("long")
    # Without its date, which `--date` gives in one of the two.
    undated = folder / "mbedtls"
    undated.mkdir()
    lines = [line for line in EXAMPLE.read_text().splitlines() if not line.startswith("date:")]
    (undated / "offload.yaml").write_text("\n".join(lines) + "\n")
    systems = [word for system in HELLO for word in ("-s", system)]
    with ThreadPoolExecutor() as pool:
        yield Long(
            folder,
            hello=pool.submit(world.run, "build", *systems, "-o", folder / "hello", "hello", status=None, limit_s=LIMIT_S),
            today=pool.submit(world.run, "build", "-o", folder / "today", undated, status=None, limit_s=LIMIT_S),
            then=pool.submit(
                world.run, "build", "--date", "auto", "-o", folder / "then", undated, status=None, limit_s=LIMIT_S
            ),
        )


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("system", HELLO)
def test_hello(long: Long, tmp_path: Path, system: str) -> None:
    done, out = long.hello.result(), long.folder / "hello" / system
    assert done.returncode == 0, done.stderr
    architecture, machine, bits = HELLO[system]
    check(out, "hello", architecture)
    result = record(out)
    assert (result["system"], result["machine"], result["state"]) == (system, machine, "succeeded")
    assert f"==> {system}: succeeded" in done.stderr
    assert "# PASS:" in (out / "build.log").read_text(), "its own tests ran"
    (deb,) = out.glob("hello_*.deb")
    subprocess.run(["dpkg-deb", "--extract", deb, tmp_path], check=True)
    # EI_CLASS of the ELF header (elf.h).
    assert (tmp_path / "usr/bin/hello").read_bytes()[4] == {32: 1, 64: 2}[bits]


@pytest.mark.timeout(LIMIT_S)
def test_a_real_time_trap_fails_today(long: Long) -> None:
    done = long.today.result()
    assert done.returncode == 1, done.stderr
    assert "0% tests passed, 2 tests failed" in done.stdout
    assert record(long.folder / "today")["machine"] == "local"


@pytest.mark.timeout(LIMIT_S)
def test_a_real_time_trap_passes_on_the_day_of_its_release(long: Long) -> None:
    done = long.then.result()
    assert done.returncode == 0, done.stderr
    assert "100% tests passed" in done.stdout
    assert "the date is 2023-03-29T19:39:41Z" in done.stderr
    result = record(long.folder / "then")
    assert (result["machine"], result["date"]) == ("build-vm", "2023-03-29T19:39:41Z")
    assert result["date_from"] == "debian/changelog of mbedtls 2.28.3-1"
    assert abs(result["clock"] - 1680118781) < 120
    assert result["clock_end"] - result["clock"] == pytest.approx(result["duration_s"], abs=60)


def test_a_package_with_a_real_test_suite(world: World, tmp_path: Path) -> None:
    world.run("build", "-o", tmp_path / "out", "libyaml")
    check(tmp_path / "out", "libyaml-0-2", "amd64")
    assert "# FAIL:  0" in (tmp_path / "out/build.log").read_text()


def test_a_package_that_is_not_for_this_architecture(world: World, tmp_path: Path) -> None:
    done = world.run("build", "-s", "arm64", "-o", tmp_path / "out", "cpuid", status=4)
    assert "the package is not for arm64: its .dsc says `Architecture:" in done.stderr
    assert record(tmp_path / "out")["state"] == "errored"
    assert "machine" not in record(tmp_path / "out"), "it was refused before a machine was chosen"


@pytest.mark.parametrize(("package", "hint"), [("helo", "did you mean hello"), ("hello=9:99", "it has 2.10")])
def test_a_package_that_does_not_exist(world: World, tmp_path: Path, package: str, hint: str) -> None:
    done = world.run("build", "-o", tmp_path / "out", package, status=5)
    assert hint in done.stderr
