"""Debian source packages by name, for real: Debian's mirror, Debian's packages, Debian's tools."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import World
from tests.long import HELLO, LIMIT_S, LongBuilds


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


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("system", HELLO)
def test_hello(long: LongBuilds, tmp_path: Path, system: str) -> None:
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
def test_a_real_time_trap_fails_today(long: LongBuilds) -> None:
    done = long.today.result()
    assert done.returncode == 1, done.stderr
    assert "x509parse-suite ..................***Failed" in done.stdout
    assert record(long.folder / "today")["machine"] == "local"


@pytest.mark.timeout(LIMIT_S)
def test_a_real_time_trap_passes_on_the_day_of_its_release(long: LongBuilds) -> None:
    done = long.then.result()
    assert done.returncode == 0, done.stderr
    assert "x509parse-suite ..................   Passed" in done.stdout
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
