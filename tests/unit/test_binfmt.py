"""What the kernel is told about foreign programs, and what it says."""

from __future__ import annotations

import ast
import json
import os
import struct
from itertools import product
from pathlib import Path
from typing import Literal

import pytest

from offload_cli.binfmt import status_table
from offloadd.binfmt.emulator import find_emulated, find_emulator, needs_loader
from offloadd.binfmt.kernel import registration_line
from offloadd.binfmt.magic import ET_DYN, ET_EXEC, MACHINES, Magic, elf_header, find_magic
from offloadd.binfmt.record import load_records, open_records
from offloadd.binfmt.register import register
from offloadd.binfmt.status import Registration, Status, find_usable, parse_entry, read_status
from offloadd.errors import HostError, NotAllowedError, UsageError
from offloadd.host import native_systems
from offloadd.model.system import SYSTEMS

LINUX = [name for name, system in SYSTEMS.items() if system.kernel == "linux"]
ABIS: tuple[Literal[0, 3], ...] = (0, 3)
NATIVE = ("x86_64-linux", "i686-linux")
AARCH64 = """\
enabled
interpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P
flags: PF
offset 0
magic 7f454c460201010000000000000000000200b700
mask ffffffffffffff00fffffffffffffffffeffffff
"""


def entry(text: str = AARCH64, name: str = "qemu-aarch64", made: int = 1) -> Registration:
    found = parse_entry(name, text, made)
    assert found is not None
    return found


def status(*entries: Registration) -> Status:
    return Status(mounted=True, enabled=True, entries=entries)


def test_every_linux_system_has_a_machine() -> None:
    assert set(MACHINES) == set(LINUX)


@pytest.mark.parametrize("system", LINUX)
def test_magic_takes_its_own_programs_and_no_others(system: str) -> None:
    magic = find_magic(system)
    for other, kind, abi in product(LINUX, range(5), ABIS):
        expected = other == system and kind in (ET_EXEC, ET_DYN)
        assert magic.matches(elf_header(other, kind, abi)) is expected, (other, kind, abi)
    assert not magic.matches(elf_header(system, ET_EXEC)[:19])


def test_headers_are_those_of_real_programs() -> None:
    """Of this host's, which a compiler made."""
    header = Path("/bin/sh").read_bytes()[:20]
    assert find_magic(native_systems()[0]).matches(header)


def test_magic_as_the_kernel_writes_it() -> None:
    magic = find_magic("s390x-linux")
    assert magic.magic.hex() == "7f454c4602020100000000000000000000020016"
    assert magic.mask.hex() == "ffffffffffffff000000000000000000fffeffff"


def debians_entries() -> list[tuple[str, Magic]]:
    """What Debian's packages register, by QEMU's name of the target."""
    found: dict[str, Magic] = {}
    for file in [*Path("/usr/lib/binfmt.d").glob("qemu-*.conf")]:
        _, name, _, offset, magic, mask, _, _ = file.read_text().strip().split(":")
        magics = [ast.literal_eval(f"b'{text}'") for text in (magic, mask)]
        found[name.removeprefix("qemu-")] = Magic(magics[0], magics[1], int(offset or 0))
    for file in Path("/usr/share/binfmts").glob("qemu-*"):
        values = dict(line.split(" ", 1) for line in file.read_text().splitlines() if " " in line)
        found[file.name.removeprefix("qemu-")] = Magic(*(ast.literal_eval(f"b'{values[key]}'") for key in ("magic", "mask")))
    return sorted(found.items())


def test_magic_means_what_debians_means() -> None:
    """Over all headers that a toolchain of Debian writes."""
    theirs = debians_entries()
    if not theirs:
        pytest.skip("no package of this host has registrations to compare with")
    compared = 0
    for name, magic in theirs:
        for system in (item for item in LINUX if SYSTEMS[item].user == name):
            compared += 1
            for other, kind, abi in product(LINUX, range(5), ABIS):
                header = elf_header(other, kind, abi)
                assert magic.matches(header) == find_magic(system).matches(header), (name, other, kind, abi)
    assert compared >= 5


def test_registration_line() -> None:
    line = registration_line("qemu-arm", find_magic("armhf-linux"), Path("/usr/bin/qemu-arm-static"))
    name, kind, offset, magic, mask, interpreter, flags = line.decode().split(":")[1:]
    assert (name, kind, offset, interpreter, flags) == ("qemu-arm", "M", "", "/usr/bin/qemu-arm-static", "OPF")
    assert ast.literal_eval(f"b'{magic}'") == elf_header("armhf-linux", ET_EXEC)
    assert len(ast.literal_eval(f"b'{mask}'")) == 20
    assert len(line) < 1920  # Linux's limit


def test_entry() -> None:
    found = entry()
    assert (found.name, found.enabled, found.flags) == ("qemu-aarch64", True, "PF")
    assert found.interpreter == "/usr/libexec/qemu-binfmt/aarch64-binfmt-P"
    assert found.covers("aarch64-linux")
    assert not found.covers("armhf-linux")
    assert not found.covers("i586-gnu")
    assert found.fault() == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "enabled\ninterpreter /usr/bin/jexec\nflags: \nextension .jar\n",
        "enabled\ninterpreter /x\nflags: \noffset 0\nmagic 7f4\n",
        "enabled\ninterpreter /x\nflags: \noffset 0\nmagic 7f45\nmask ff\n",
        "enabled\ninterpreter /x\nflags: \noffset none\nmagic 7f45\n",
    ],
)
def test_entries_that_are_none(text: str) -> None:
    assert parse_entry("x", text, 0) is None


def test_entry_without_mask() -> None:
    found = entry("enabled\ninterpreter /x\nflags: \noffset 2\nmagic 4c46\n")
    assert found.magic == Magic(b"LF", b"\xff\xff", 2)
    assert not found.covers("aarch64-linux") or found.covers("armhf-linux")


def test_an_entry_for_some_of_the_programs_does_not_cover() -> None:
    """Without the position-independent ones, which is most of them."""
    exact = AARCH64.replace("fffffeffffff", "ffffffffffff")
    assert not entry(exact).covers("aarch64-linux")


def test_the_newest_enabled_entry_counts() -> None:
    old, new = entry(name="old", made=1), entry(AARCH64.replace("enabled", "disabled"), name="new", made=2)
    assert status(new, old).find("aarch64-linux") is old
    assert status(new).find("aarch64-linux") is new


def test_usable() -> None:
    usable = find_usable(status(entry()), NATIVE)
    assert usable.systems == ("aarch64-linux",)
    assert set(usable.missing) == set(SYSTEMS) - {"aarch64-linux", *NATIVE}
    assert usable.missing["s390x-linux"] == "qemu-s390x is not registered: offload binfmt register s390x"
    assert usable.missing["armhf-linux"] == "qemu-arm is not registered: offload binfmt register armhf"
    assert usable.missing["i586-gnu"] == "QEMU has no user-mode emulation of i586-gnu"


def test_every_remedy_can_be_typed() -> None:
    """Its last word is a system's name."""
    from offloadd.model.system import find_system

    for system, why in find_usable(status(), NATIVE).missing.items():
        if "register" in why:
            assert find_system(why.split()[-1]).name == system


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (AARCH64.replace("flags: PF", "flags: P"), "is registered without the flag F"),
        (AARCH64.replace("enabled", "disabled"), "is disabled"),
    ],
)
def test_faulty_registrations(text: str, why: str) -> None:
    usable = find_usable(status(entry(text)), NATIVE)
    assert "aarch64-linux" not in usable.systems
    assert why in usable.missing["aarch64-linux"]
    assert usable.missing["aarch64-linux"].endswith("offload binfmt register aarch64 --force")


def test_nothing_works_when_binfmt_misc_is_off() -> None:
    off = Status(mounted=True, enabled=False, entries=(entry(),))
    assert "switched off" in find_usable(off, NATIVE).missing["aarch64-linux"]
    assert find_usable(Status(mounted=False), NATIVE).systems == ()


@pytest.fixture
def binfmt_misc(tmp_path: Path) -> Path:
    """A folder that looks like binfmt_misc."""
    root = tmp_path / "binfmt_misc"
    root.mkdir()
    (root / "register").touch()
    (root / "status").write_text("enabled\n")
    (root / "qemu-aarch64").write_text(AARCH64)
    (root / "jar").write_text("enabled\ninterpreter /usr/bin/jexec\nflags: \nextension .jar\n")
    return root


def test_status(binfmt_misc: Path, tmp_path: Path) -> None:
    os.utime(binfmt_misc / "qemu-aarch64", ns=(5, 5))
    (binfmt_misc / "other").write_text(AARCH64)
    found = read_status(binfmt_misc, {"qemu-aarch64": 5, "other": 5})
    assert (found.mounted, found.enabled) == (True, True)
    assert [(item.name, item.ours) for item in found.entries] == [("other", False), ("qemu-aarch64", True)]
    assert read_status(tmp_path) == Status(mounted=False)


def test_an_interpreter_that_needs_libraries(binfmt_misc: Path) -> None:
    (binfmt_misc / "qemu-aarch64").write_text(AARCH64.replace("/usr/libexec/qemu-binfmt/aarch64-binfmt-P", "/bin/sh"))
    assert "needs libraries" in find_usable(read_status(binfmt_misc, {}), NATIVE).missing["aarch64-linux"]


def test_records(tmp_path: Path) -> None:
    file = tmp_path / "records"
    assert load_records(file) == {}
    with open_records(file) as records:
        records["qemu-arm"] = 7
    with open_records(file) as records:
        assert records == {"qemu-arm": 7}
        records["qemu-s390x"] = 8
        del records["qemu-arm"]
    assert load_records(file) == {"qemu-s390x": 8}


@pytest.mark.parametrize("text", ["", "[]", "no json", '{"qemu-arm": "yesterday"}'])
def test_damaged_records_claim_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "records").write_text(text)
    assert load_records(tmp_path / "records") == {}


def elf(*segments: int) -> bytes:
    header = bytes([0x7F, *b"ELF", 2, 1, 1]).ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    return header + b"".join(struct.pack("<II", kind, 5).ljust(56, b"\0") for kind in segments)


def test_loader(tmp_path: Path) -> None:
    program = tmp_path / "program"
    for data, expected in ((elf(6, 3, 1), True), (elf(1), False), (b"#!/bin/sh\n", False), (elf(3)[:50], False), (b"", False)):
        program.write_bytes(data)
        assert needs_loader(program) is expected
    assert needs_loader(tmp_path) is False
    assert needs_loader(tmp_path / "none") is False


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put(program: Path, data: bytes) -> Path:
    program.write_bytes(data)
    program.chmod(0o755)
    return program


def test_emulator(programs: Path) -> None:
    system = SYSTEMS["powerpc64le-linux"]
    with pytest.raises(HostError, match="qemu-ppc64le is not installed") as caught:
        find_emulator(system)
    assert "qemu-user-static" in caught.value.hint
    put(programs / "qemu-ppc64le", elf(3, 1))
    with pytest.raises(HostError, match="needs libraries"):
        find_emulator(system)
    assert find_emulated(()) == []
    put(programs / "qemu-ppc64le", elf(1))
    assert find_emulator(system) == programs / "qemu-ppc64le"
    put(programs / "qemu-ppc64le-static", elf(1))
    assert find_emulator(system) == programs / "qemu-ppc64le-static"
    assert find_emulated(()) == ["powerpc64le-linux"]
    assert find_emulated(("powerpc64le-linux",)) == []


def test_what_cannot_be_registered() -> None:
    for system in native_systems():
        with pytest.raises(UsageError, match="runs it by itself"):
            register([system])
    with pytest.raises(UsageError, match="no user-mode emulation"):
        register(["i586-gnu"])


def test_only_root_registers(programs: Path, monkeypatch: pytest.MonkeyPatch, binfmt_misc: Path, tmp_path: Path) -> None:
    foreign = next(system for system in LINUX if system not in native_systems())
    user = SYSTEMS[foreign].user
    put(programs / f"qemu-{user}-static", elf(1))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotAllowedError, match="only root") as caught:
        register([foreign], root=binfmt_misc, records=tmp_path / "records")
    assert caught.value.hint == f"sudo offload binfmt register {SYSTEMS[foreign].short}"


def test_native_systems() -> None:
    machine = os.uname().machine
    if machine == "x86_64":
        assert native_systems() == NATIVE
    assert set(native_systems()) <= set(SYSTEMS)


def test_table() -> None:
    rows = [
        {"system": "x86_64-linux", "debian": "amd64", "native": True, "usable": False, "why": ""},
        {
            "system": "aarch64-linux",
            "debian": "arm64",
            "native": False,
            "usable": True,
            "why": "",
            "registration": {"owner": "offload", "flags": "POF", "interpreter": "/usr/bin/qemu-aarch64-static"},
        },
        {"system": "s390x-linux", "debian": "s390x", "native": False, "usable": False, "why": "not registered"},
    ]
    assert json.loads(json.dumps(rows)) == rows
    _, native, usable, missing = [line.split() for line in status_table(rows).splitlines()]
    assert native == ["x86_64-linux", "amd64", "native", "-", "-"]
    assert usable == ["aarch64-linux", "arm64", "usable", "offload", "POF", "/usr/bin/qemu-aarch64-static"]
    assert missing == ["s390x-linux", "s390x", "-", "-", "-", "not", "registered"]
