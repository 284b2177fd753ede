"""The scripts beside the Makefile, with stand-ins for the programs that they call."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder that comes first on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder


def put_program(folder: Path, name: str, script: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def run(command: list[str], programs: Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": f"{programs}:/usr/bin:/bin"}
    return subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def dpkg_query(installed: Sequence[str]) -> str:
    """A stand-in that knows of these, in the format that the script asks for."""
    assert "'${db:Status-Status} ${Package}, ${Provides}\\n'" in (REPOSITORY / "install-host-packages").read_text()
    return "\n".join(["cat <<END", *(f"installed {words}" for words in installed), "config-files uidmap, ", "END"])


def listed_packages() -> list[str]:
    lines = (REPOSITORY / "install-host-packages").read_text().split("LIST'\n")[1].split("\nLIST\n")[0].splitlines()
    return [line.split()[0] for line in lines]


ALL_INSTALLED = dpkg_query([f"{package}, " for package in listed_packages()])
NONE_INSTALLED = dpkg_query([])


def be(programs: Path, user: str, uid: int) -> None:
    put_program(programs, "id", f"""case "$*" in -u) echo {uid};; -un) echo {user};; esac""")


def put_subuids(programs: Path, first: int) -> None:
    """`/etc/subuid` cannot be changed in a test, so the program that searches it answers."""
    put_program(programs, "grep", f"""case "$*" in *subuid|*subgid) exit {first};; esac; exec /bin/grep "$@" """)


def test_packages_all_there(programs: Path) -> None:
    be(programs, "root", 0)
    put_program(programs, "dpkg-query", ALL_INSTALLED)
    put_program(programs, "apt-get", "exit 99")
    done = run(["./install-host-packages"], programs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_packages_of_another_name(programs: Path, tmp_path: Path) -> None:
    """Debian 13's qemu-user provides what was a package of its own."""
    be(programs, "root", 0)
    others = [f"{package}, " for package in listed_packages() if package not in ("qemu-user-static", "uidmap")]
    provider = "qemu-user, qemu-user-aarch64 (= 1:10.0), qemu-user-static (= 1:10.0)"
    put_program(programs, "dpkg-query", dpkg_query([*others, provider, "not-uidmap, uidmapper"]))
    put_program(programs, "apt-get", f'echo "$*" >> {tmp_path}/asked')
    done = run(["./install-host-packages"], programs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "install --yes --no-install-recommends uidmap"


def test_packages_missing_as_root(programs: Path, tmp_path: Path) -> None:
    be(programs, "root", 0)
    put_program(programs, "dpkg-query", NONE_INSTALLED)
    put_program(programs, "apt-get", f'echo "$DEBIAN_FRONTEND: $*" >> {tmp_path}/asked')
    done = run(["./install-host-packages"], programs)
    assert done.returncode == 0, done.stderr
    update, install = (tmp_path / "asked").read_text().splitlines()
    assert update == "noninteractive: update"
    assert install.startswith("noninteractive: install --yes --no-install-recommends arch-test bubblewrap ")
    assert " uidmap" in install


def test_packages_install_fails(programs: Path) -> None:
    be(programs, "root", 0)
    put_program(programs, "dpkg-query", NONE_INSTALLED)
    put_program(programs, "apt-get", '[ "$1" = update ]')
    assert run(["./install-host-packages"], programs).returncode != 0


def test_packages_missing_without_root(programs: Path) -> None:
    be(programs, "somebody", 1234)
    put_subuids(programs, 0)
    put_program(programs, "sudo", "exit 1")
    put_program(programs, "dpkg-query", NONE_INSTALLED)
    put_program(programs, "apt-get", "exit 99")
    done = run(["./install-host-packages"], programs)
    assert done.returncode == 1
    assert "as root, run:\n    apt-get update && apt-get install --yes" in done.stderr
    assert "usermod" not in done.stderr


def test_packages_with_sudo(programs: Path, tmp_path: Path) -> None:
    be(programs, "somebody", 1234)
    put_subuids(programs, 1)
    put_program(programs, "sudo", f'[ "$1" = -n ] && exit 0; echo "$@" > {tmp_path}/asked')
    put_program(programs, "dpkg-query", ALL_INSTALLED)
    done = run(["./install-host-packages"], programs)
    assert done.returncode == 0, done.stderr
    assert "usermod --add-subuids" in (tmp_path / "asked").read_text()


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo, in a place of its own."""
    shutil.copy(REPOSITORY / "demo", tmp_path / "demo")
    return tmp_path


OFFLOAD = """
case "$*" in
    "image build debian") exit {image};;
    "build --date now examples/time-trap") exit {today};;
    "build --date 2020-06-01 -o demo-output examples/time-trap")
        mkdir -p demo-output/dist; {output}; exit {then};;
esac
exit 2
"""
WRITE = "echo zip > demo-output/dist/time-trap-1.0.zip"


@pytest.mark.parametrize(
    ("image", "today", "then", "output", "status"),
    [
        (0, 1, 0, WRITE, 0),
        (75, 1, 0, WRITE, 1),
        (0, 0, 0, WRITE, 1),
        (0, 75, 0, WRITE, 1),
        (0, 1, 1, WRITE, 1),
        (0, 1, 0, ":", 1),
    ],
)
def test_demo_verdict(programs: Path, demo: Path, image: int, today: int, then: int, output: str, status: int) -> None:
    put_program(programs, "offload", OFFLOAD.format(image=image, today=today, then=then, output=output))
    done = run(["./demo"], programs, cwd=demo)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("As expected" in done.stdout) is (status == 0)
    assert ("did not go as expected" in done.stderr) is (status != 0)


def test_demo_without_offload(programs: Path, demo: Path) -> None:
    done = run(["./demo"], programs, cwd=demo)
    assert done.returncode == 1
    assert "make venv" in done.stderr


def test_help_names_every_target() -> None:
    done = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    for target in ("help", "venv", "deps", "demo", "test", "unit", "lint", "bench", "clean"):
        assert f"  make {target} " in done.stdout


def test_no_python_is_a_clear_message(programs: Path, tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path / "Makefile")
    (tmp_path / "pyproject.toml").touch()
    put_program(programs, "python3", "exit 1")
    done = run(["make", "venv", "PYTHON=python3"], programs, cwd=tmp_path)
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
