"""What `offload doctor` finds."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from offload_cli.doctor import doctor_lines
from offloadd import doctor
from offloadd.binfmt.magic import ET_EXEC, elf_header
from offloadd.binfmt.status import Registration, Status, parse_entry
from offloadd.config.library import load_library
from offloadd.daemon.host_memory import HostMemory
from offloadd.doctor import Program, Requirement, State
from offloadd.paths import Paths, find_paths, shipped

from .test_templates import place_template


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path / "c", state=tmp_path / "s", cache=tmp_path / "cache", runtime=tmp_path / "r")


def test_programs() -> None:
    there = doctor.check_program(Program(name="sh", package="dash", purpose="x"))
    assert (there.state, there.remedy) == (State.OK, "")
    gone = doctor.check_program(Program(name="no-such-program", package="some-package", purpose="x"))
    assert gone.state is State.MISSING
    assert gone.remedy.endswith("apt-get install some-package")


def test_configuration_tells_every_problem(paths: Paths) -> None:
    library, row = doctor.check_configuration(paths)
    assert library is not None
    assert row.state is State.OK
    (paths.config / "machines").mkdir(parents=True)
    (paths.config / "machines/wrong.yaml").write_text("kind: build-vm\nimage: debian\ncpu-count: none\ncolour: red\n")
    library, row = doctor.check_configuration(paths)
    assert library is None
    assert row.state is State.MISSING
    assert "wrong.yaml:3: cpu-count" in row.found
    assert "wrong.yaml:4: colour" in row.found


def test_disk(tmp_path: Path) -> None:
    assert doctor.check_disk(tmp_path / "not/there/yet", least=0).state is State.OK
    assert doctor.check_disk(tmp_path, least=1 << 60).state is State.WARNING


def test_memory(tmp_path: Path) -> None:
    library = load_library(find_paths().library[:1])
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000000 kB\nMemAvailable:   8000000 kB\n")
    assert doctor.check_memory(library, meminfo).state is State.OK
    meminfo.write_text("MemAvailable:   1000000 kB\n")
    row = doctor.check_memory(library, meminfo)
    assert row.state is State.WARNING
    assert "build-vm" in row.found


def _verdict(file: Path, accelerator: str, boot_id: str | None = None) -> Path:
    boot_id = boot_id or Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file.write_text(json.dumps({"accelerator": accelerator, "reason": "why", "boot_id": boot_id, "qemu": "/q"}))
    return file


def test_kvm(tmp_path: Path) -> None:
    device, verdict = tmp_path / "kvm", tmp_path / "accelerator.json"
    assert "there is no" in doctor.check_kvm(verdict, device).found
    device.touch()
    assert doctor.check_kvm(verdict, device).found.endswith("the first start of a machine tries it")
    row = doctor.check_kvm(_verdict(verdict, "tcg"), device)
    assert (row.state, row.found) == (State.WARNING, "does not work, TCG is used: why")
    assert doctor.check_kvm(_verdict(verdict, "kvm"), device).state is State.OK
    # Another boot may be another kernel.
    assert "tries it" in doctor.check_kvm(_verdict(verdict, "tcg", "another boot"), device).found
    verdict.write_text("{")
    assert "tries it" in doctor.check_kvm(verdict, device).found


def test_subordinate_ids(tmp_path: Path) -> None:
    subuid, subgid = tmp_path / "subuid", tmp_path / "subgid"
    subuid.write_text(f"{os.geteuid()}:100000:65536\n")
    row = doctor.check_subordinate_ids((subuid, subgid))
    assert row.state is State.MISSING
    # What others have is left alone.
    assert "165536-231071" in row.remedy
    subgid.write_text(f"other:1:2\n{os.geteuid()}:100000:65536\n")
    assert doctor.check_subordinate_ids((subuid, subgid)).state is State.OK


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces=10000"),
        ("kernel/unprivileged_userns_clone", "1", "inside a container"),
    ],
)
def test_namespace_remedy(tmp_path: Path, name: str, value: str, remedy: str) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(f"{value}\n")
    assert remedy in doctor._namespace_remedy(tmp_path)


def test_sockets() -> None:
    short = Paths(config=Path("/c"), state=Path("/s"), cache=Path("/k"), runtime=Path("/r"))
    assert doctor.check_sockets(short, None).state is State.OK
    row = doctor.check_sockets(replace(short, state=Path("/" + "s" * 90)), None)
    assert row.state is State.MISSING
    assert "XDG_STATE_HOME" in row.remedy
    assert "XDG_RUNTIME_DIR" in doctor.check_sockets(replace(short, runtime=Path("/" + "r" * 120)), None).remedy


async def test_an_image_that_is_not_built(paths: Paths) -> None:
    library, _ = doctor.check_configuration(paths)
    first, *_ = await doctor.check_images(paths, library)
    assert (first.name, first.state) == ("image debian", State.OK)
    assert "not built yet" in first.found


async def test_a_disk_that_nobody_has_named(paths: Paths) -> None:
    library = load_library([shipped()])
    rows = {row.name: row for row in await doctor.check_images(paths, library)}
    row = rows["image hurd-guix"]
    assert (row.state, row.found, row.purpose) == (State.WARNING, "not set up", "GNU/Hurd: builds for i586-gnu")
    assert row.remedy == "offload image set hurd-guix FILE-OR-URL"

    (paths.config / "images").mkdir(parents=True)
    (paths.config / "images/hurd-guix.yaml").write_text("like: hurd-guix\npath: gone.qcow2\n")
    rows = {row.name: row for row in await doctor.check_images(paths, load_library(paths.library))}
    assert "No such file" in rows["image hurd-guix"].found


def test_daemon(paths: Paths) -> None:
    assert "not running" in doctor.check_daemon(paths.socket).found
    paths.runtime.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(paths.socket))
        listener.listen()
        assert "running, " in doctor.check_daemon(paths.socket).found


def test_binfmt() -> None:
    arm = "interpreter /x\nflags: {}\noffset 0\nmagic " + elf_header("armhf-linux", ET_EXEC)[:7].hex()
    native = ("x86_64-linux", "i686-linux")

    def check(
        *entries: Registration | None, installed: tuple[str, ...] = ("armhf-linux",), mounted: bool = True
    ) -> Requirement:
        found = Status(mounted=mounted, enabled=True, entries=tuple(entry for entry in entries if entry))
        return doctor.check_binfmt(found, installed, native)

    good = parse_entry("good", f"enabled\n{arm.format('F')}", 0)
    row = check(good)
    assert (row.state, row.found, row.remedy) == (State.OK, "armhf-linux", "")
    row = check(parse_entry("bad", f"enabled\n{arm.format('P')}", 0))
    assert row.state is State.WARNING
    assert "bad is registered without the flag F" in row.found
    assert row.remedy.endswith("offload binfmt register --force")
    assert check().remedy.endswith("offload binfmt register")
    assert check(mounted=False).found == "binfmt_misc is not mounted"
    assert check(installed=()).remedy.endswith("apt-get install qemu-user-static")


def test_lines() -> None:
    rows = [
        Requirement(name="python", state=State.OK, found="3.13"),
        Requirement(name="mke2fs", state=State.MISSING, found="not installed", purpose="disks", remedy="apt install e2fsprogs"),
    ]
    assert doctor_lines(rows, coloured=False) == [
        "ok       python  3.13",
        "missing  mke2fs  not installed",
        "                 for: disks",
        "                 mend: apt install e2fsprogs",
        "Missing: mke2fs.",
    ]
    assert "\x1b[31m" in doctor_lines(rows, coloured=True)[1]


def test_clones_that_are_to_wait(paths: Paths) -> None:
    def look(gib: float) -> list[Requirement]:
        memory = HostMemory(total=8 << 30, available=int(gib * (1 << 30)), pressure=None)
        return doctor.check_warm(load_library(paths.library), memory)

    assert doctor.check_warm(None, HostMemory(total=0, available=0, pressure=None)) == []
    folder = paths.config / "machines"
    folder.mkdir(parents=True)
    (folder / "build-vm.yaml").write_text("kind: build-vm\nimage: debian\nwarm: 0\n")
    (folder / "no.yaml").write_text("kind: build-vm\nimage: debian\nwarm: 9\ntemplate: false\n")
    assert look(8) == []
    (folder / "vm.yaml").write_text("kind: build-vm\nimage: debian\nmemory-size: 8192\nwarm: 2\n")
    # Two of a gigabyte each; a quarter of the host's memory is left alone.
    assert [row.state for row in look(4)] == [State.OK]
    (row,) = look(3.5)
    assert row.state is State.WARNING
    assert "2 clones may need 2.0 GiB, and there is room for 1.5 GiB" in row.found
    assert "`warm` of vm" in row.remedy
    assert "room for 0 B" in look(1)[0].found


def test_templates_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_templates(tmp_path).found == "none made yet"
    place_template(tmp_path, "a" * 64, {})
    assert doctor.check_templates(tmp_path).found.startswith("1 made, ")

    def refuse(name: str, size: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(doctor, "open_memory", refuse)
    row = doctor.check_templates(tmp_path)
    assert row.state is State.WARNING
    assert "Function not implemented" in row.found
