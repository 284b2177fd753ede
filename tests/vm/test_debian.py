"""Debian source packages by name, for real: Debian's mirror, Debian's packages, Debian's tools."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import World

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


@pytest.mark.usefixtures("binfmt")
def test_hello_for_three_systems(world: World, tmp_path: Path) -> None:
    systems = {"x86_64-linux": ("amd64", "local"), "i686-linux": ("i386", "local"), "aarch64-linux": ("arm64", "binfmt")}
    options = [word for system in systems for word in ("-s", system)]
    done = world.run("build", *options, "-o", tmp_path / "out", "hello")

    for system, (architecture, machine) in systems.items():
        out = tmp_path / "out" / system
        check(out, "hello", architecture)
        result = record(out)
        assert (result["system"], result["machine"], result["state"]) == (system, machine, "succeeded")
        assert f"==> {system}: succeeded" in done.stderr
        assert "# PASS:" in (out / "build.log").read_text()
    (program,) = (tmp_path / "out/i686-linux").glob("hello_*.deb")
    subprocess.run(["dpkg-deb", "--extract", program, tmp_path / "i386"], check=True)
    assert (tmp_path / "i386/usr/bin/hello").read_bytes()[4] == 1, "a 32-bit program"


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


def test_a_real_time_trap(world: World, tmp_path: Path) -> None:
    """Fails today on this host, passes in a VM on the day of its release, which is found by itself."""
    today = tmp_path / "mbedtls"
    today.mkdir()
    lines = [line for line in EXAMPLE.read_text().splitlines() if not line.startswith("date:")]
    (today / "offload.yaml").write_text("\n".join(lines) + "\n")
    done = world.run("build", "-o", tmp_path / "today", today, status=1)
    assert "50% tests passed" in done.stdout or "0% tests passed" in done.stdout
    assert record(tmp_path / "today")["machine"] == "local"

    done = world.run("build", "--date", "auto", "-o", tmp_path / "then", today)
    assert "100% tests passed" in done.stdout
    result = record(tmp_path / "then")
    assert (result["machine"], result["date"]) == ("build-vm", "2023-03-29T19:39:41Z")
    assert result["date_from"] == "debian/changelog of mbedtls 2.28.3-1"
    assert "the date is 2023-03-29T19:39:41Z" in done.stderr
    assert abs(result["clock"] - 1680118781) < 120
    assert result["clock_end"] - result["clock"] == pytest.approx(result["duration_s"], abs=30)
