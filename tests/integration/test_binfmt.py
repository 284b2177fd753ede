"""`offload binfmt` with the real kernel and the real qemu-user.

The tests have a binfmt_misc of their own, in a user namespace (Linux 6.7), so that whatever else runs on this host keeps its
registrations.  An older kernel has only one: then it is the host's, and put back as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offloadd.binfmt.kernel import registration_line
from offloadd.binfmt.magic import Magic, find_magic
from offloadd.binfmt.status import read_status
from offloadd.builder.fault import find_emulator_fault
from tests.foreign import EXIT_42, ILLEGAL, PRINT_5_OF_ARGV0, SEGFAULT, write_program

MISC = "/proc/sys/fs/binfmt_misc"
CANNOT_RUN = 126
"""Of a shell, for a program that the kernel does not take."""
SYSTEMS = ["aarch64-linux", "armhf-linux", "riscv64-linux", "powerpc64le-linux", "s390x-linux"]


class Host:
    """A host of its own, as far as binfmt_misc and /run go."""

    def __init__(self, enter: Sequence[str]) -> None:
        self._enter = enter

    def shell(self, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        argv = [*self._enter, "sh", "-c", command, "sh", *map(str, arguments)]
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def offload(self, *arguments: str, status: int = 0) -> str:
        """Run `offload binfmt`; what it printed."""
        command = 'exec "$0" -m offload_cli binfmt "$@"'
        argv = [*self._enter, "sh", "-c", command, sys.executable, *arguments]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def status(self, system: str) -> Any:
        (row,) = json.loads(self.offload("status", system, "--json"))["systems"]
        return row

    def run(self, program: Path) -> int:
        return self.shell('exec "$1"', program).returncode

    def put(self, name: str, magic: Magic, interpreter: str, flags: str) -> None:
        """Register something as another program would."""
        line = registration_line(name, magic, Path(interpreter)).decode().rpartition(":")[0]
        self.write("register", f"{line}:{flags}")

    def write(self, file: str, text: str) -> None:
        done = self.shell(
            f'[ -e {MISC}/register ] || mount -t binfmt_misc binfmt_misc {MISC}; printf %s "$1" > {MISC}/{file}', text
        )
        assert done.returncode == 0, done.stderr


MAKE = (
    "mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /proc/sys/fs && mkdir /proc/sys/fs/binfmt_misc && echo made && exec cat"
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host on which nothing is registered, and binfmt_misc not even mounted."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MAKE]
    with subprocess.Popen(unshare, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "made\n", "user namespaces cannot be made here: offload doctor"
        try:
            own = Host(["nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials", f"--wd={tmp_path}"])
            if own.shell("mkdir probe && mount -t binfmt_misc binfmt_misc probe && umount probe").returncode == 0:
                yield own
            else:
                with _shared_host() as shared:
                    yield shared
        finally:
            holder.stdin.close()


@contextmanager
def _shared_host() -> Iterator[Host]:
    """This host itself, without its registrations meanwhile."""
    if os.geteuid() != 0:
        pytest.fail("this kernel has one binfmt_misc for all: run these tests as root", pytrace=False)
    host, before = Host([]), read_status().entries
    try:
        for entry in before:
            host.write(entry.name, "-1")
        yield host
    finally:
        for entry in read_status().entries:
            host.write(entry.name, "-1")
        for entry in reversed(before):
            host.put(entry.name, entry.magic, entry.interpreter, entry.flags)


@pytest.mark.parametrize("system", SYSTEMS)
def test_register_run_unregister(host: Host, tmp_path: Path, system: str) -> None:
    program = write_program(tmp_path / "program", system, EXIT_42[system])
    assert host.run(program) == CANNOT_RUN
    assert not host.status(system)["usable"]
    assert "registered" in host.offload("register", system)
    row = host.status(system)
    assert row["usable"]
    assert row["registration"]["owner"] == "offload"
    assert {"F", "P"} <= set(row["registration"]["flags"])
    assert host.run(program) == 42
    assert "works already, registered by offload" in host.offload("register", system)
    assert "unregistered" in host.offload("unregister", system)
    assert host.run(program) == CANNOT_RUN
    assert "is not registered" in host.offload("unregister", system)


def test_found_in_another_root(host: Host, tmp_path: Path) -> None:
    """What the flag F is for: there is nothing in that root but the program."""
    root = tmp_path / "root"
    root.mkdir()
    write_program(root / "program", "s390x-linux", EXIT_42["s390x-linux"])
    host.offload("register", "s390x")
    assert host.shell('chroot "$1" /program', root).returncode == 42


def test_programs_keep_their_name(host: Host, tmp_path: Path) -> None:
    code = PRINT_5_OF_ARGV0 + EXIT_42["aarch64-linux"]
    program = write_program(tmp_path / "program", "aarch64-linux", code)
    host.offload("register", "arm64")
    done = host.shell("exec \"$1\" -c \"import os; os.execv('$2', ['hello'])\"", sys.executable, program)
    assert (done.returncode, done.stdout) == (42, "hello")


def test_all_that_are_installed(host: Host) -> None:
    host.offload("register")
    rows = json.loads(host.offload("status", "--json"))["systems"]
    assert {row["system"] for row in rows if row["usable"]} >= set(SYSTEMS)
    assert not any(row["usable"] or "registration" in row for row in rows if row["native"])
    assert host.offload("unregister").count("unregistered") >= len(SYSTEMS)
    assert "nothing is registered by offload" in host.offload("unregister")


@pytest.mark.parametrize("name", ["qemu-aarch64", "somebody-elses"])
def test_what_works_is_left_alone(host: Host, tmp_path: Path, name: str) -> None:
    """Whatever it is called."""
    program = write_program(tmp_path / "program", "aarch64-linux", EXIT_42["aarch64-linux"])
    host.put(name, find_magic("aarch64-linux"), "/usr/bin/qemu-aarch64-static", "F")
    assert f"{name} works already, registered by another program" in host.offload("register", "arm64")
    assert host.status("arm64")["registration"] == {
        "name": name,
        "interpreter": "/usr/bin/qemu-aarch64-static",
        "flags": "F",
        "enabled": True,
        "owner": "another program",
    }
    refused = host.offload("unregister", "arm64", status=6)
    assert f"{name} (/usr/bin/qemu-aarch64-static) was not registered by offload" in refused
    assert "nothing is registered by offload" in host.offload("unregister")
    assert host.run(program) == 42
    host.offload("unregister", "arm64", "--force")
    assert host.run(program) == CANNOT_RUN


@pytest.mark.parametrize("name", ["qemu-aarch64", "somebody-elses"])
def test_what_does_not_work_is_replaced_by_force_alone(host: Host, name: str) -> None:
    host.put(name, find_magic("aarch64-linux"), "/usr/bin/qemu-aarch64-static", "")
    assert "without the flag F" in host.status("arm64")["why"]
    refused = host.offload("register", "s390x", "arm64", status=6)
    assert f"{name} is registered without the flag F" in refused
    assert "--force" in refused
    assert not host.status("s390x")["usable"], "all is checked before anything is changed"
    host.offload("register", "arm64", "--force")
    row = host.status("arm64")
    assert row["usable"]
    assert row["registration"]["owner"] == "offload"
    host.offload("unregister", "arm64")
    # What is not called as ours is still there.
    assert ("registration" in host.status("arm64")) == (name != "qemu-aarch64")


def test_disabled(host: Host, tmp_path: Path) -> None:
    host.put("qemu-arm", find_magic("armhf-linux"), "/usr/bin/qemu-arm-static", "F")
    host.write("qemu-arm", "0")
    assert "qemu-arm is disabled" in host.status("armhf")["why"]
    host.offload("register", "armhf", status=6)
    host.offload("register", "armhf", "--force")
    assert host.run(write_program(tmp_path / "program", "armhf-linux", EXIT_42["armhf-linux"])) == 42


def test_switched_off(host: Host) -> None:
    host.offload("register", "armhf")
    host.write("status", "0")
    assert "switched off" in host.status("armhf")["why"]
    assert "is switched off, and not by offload" in host.offload("register", "armhf", status=6)
    host.offload("register", "armhf", "--force")
    assert host.status("armhf")["usable"]


def test_somebody_replaced_ours(host: Host) -> None:
    """Of the same name, but no more ours."""
    host.offload("register", "armhf")
    host.write("qemu-arm", "-1")
    host.put("qemu-arm", find_magic("armhf-linux"), "/usr/bin/qemu-arm-static", "F")
    assert host.status("armhf")["registration"]["owner"] == "another program"
    host.offload("unregister", "armhf", status=6)


def test_a_missing_emulator(host: Host) -> None:
    refused = host.shell('PATH=/sbin; exec "$1" -m offload_cli binfmt register s390x', sys.executable)
    assert refused.returncode == 75
    assert "s390x-linux: qemu-s390x is not installed" in refused.stderr
    assert "apt-get install qemu-user-static" in refused.stderr
    assert not host.status("s390x")["usable"]


@pytest.mark.parametrize("system", ["amd64", "hurd-i386", "vax"])
def test_nonsense(host: Host, system: str) -> None:
    host.offload("register", system, status=2)


def test_without_root(host: Host) -> None:
    """In the user's own namespace, where he is nobody special."""
    done = subprocess.run(
        ["unshare", "--user", sys.executable, "-m", "offload_cli", "binfmt", "register", "s390x"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "only root may register emulators" in done.stderr
    assert "binfmt register s390x" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (ILLEGAL, "qemu: uncaught target signal 4 (Illegal instruction) - core dumped"),
        (SEGFAULT, "qemu: uncaught target signal 11 (Segmentation fault) - core dumped"),
    ],
    ids=["illegal", "segfault"],
)
def test_what_qemu_says_of_a_fault(host: Host, tmp_path: Path, code: bytes, said: str) -> None:
    """The log of a real failure, of make's and of the shell's making."""
    program = write_program(tmp_path / "program", "aarch64-linux", code)
    (tmp_path / "Makefile").write_text(f"all:\n\t{program}\n")
    host.offload("register", "arm64")
    for command in ('make -C "$2" 2>&1', '"$1" 2>&1; exit $?'):
        done = host.shell(command, program, tmp_path)
        assert done.returncode
        assert find_emulator_fault(done.stdout, done.returncode) == said
        alone = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("qemu:"))
        assert find_emulator_fault(alone, done.returncode), "what others say of it is enough"


def test_a_system_call_that_is_none(host: Host, tmp_path: Path) -> None:
    """QEMU tells on request alone, and the program goes on."""
    # mov x8, #9999; svc #0
    call = bytes.fromhex("e8e184d2 010000d4")
    program = write_program(tmp_path / "program", "aarch64-linux", call + EXIT_42["aarch64-linux"])
    host.offload("register", "arm64")
    silent = host.shell('exec "$1" 2>&1', program)
    assert (silent.returncode, silent.stdout) == (42, "")
    asked = host.shell('QEMU_LOG=unimp exec "$1" 2>&1', program)
    assert find_emulator_fault(asked.stdout, asked.returncode) == "Unsupported syscall: 9999"


def test_on_this_host_itself(binfmt: tuple[str, ...], tmp_path: Path) -> None:
    """What the tests that build for other architectures rely on."""
    for system in binfmt:
        program = write_program(tmp_path / system, system, EXIT_42[system])
        assert subprocess.run([program], timeout=60).returncode == 42, system
