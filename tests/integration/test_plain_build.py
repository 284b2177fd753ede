"""Builds over a real SSH login with what a small system has, and nothing else: no Python, no bubblewrap."""

from __future__ import annotations

import io
import os
import pwd
import secrets
import shutil
import stat
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from offloadd.bridge import Bridge, open_bridge
from offloadd.builder import course, plain
from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver, unpack_outputs
from offloadd.builder.plain import run_plain_build
from offloadd.errors import BuildFailedError, BuildTimeoutError, ProtocolError, SshError, UsageError
from offloadd.guest.ssh import Guest, open_remote
from offloadd.place.childhurd import install_packages

from .real_sshd import SSHD
from .test_remote import Remote, kill_sessions, start, stop

pytestmark = pytest.mark.skipif(SSHD is None, reason="openssh-server is not installed")

COREUTILS = ["cat", "chmod", "cp", "date", "echo", "env", "false", "head", "id", "ls", "mkdir", "mv", "nproc", "rm", "sleep"]
COREUTILS += ["sort", "touch", "tr", "true", "uname", "wc"]
TOOLS = [*COREUTILS, "find", "grep", "tar"]
SYSTEMS = {"dash": ("dash", ["setsid"]), "bash-without-setsid": ("bash", [])}
"""The shell, and what there is beside the usual tools."""


def make_path(folder: Path, system: str) -> Path:
    """A directory with the programs of one kind of system."""
    shell, further = SYSTEMS[system]
    path = folder / "bin"
    path.mkdir()
    for name, target in [*((name, name) for name in (*TOOLS, *further)), ("sh", shell)]:
        found = shutil.which(target)
        assert found, target
        (path / name).symlink_to(found)
    return path


class Case:
    """A login on one such system, and what builds there have said."""

    def __init__(self, folder: Path, remote: Remote, guest: Guest) -> None:
        self.folder = folder
        self.remote = remote
        self.guest = guest
        self.text = ""
        self.heard = trio.Event()
        self.steps: list[int] = []
        self.top = Path(plain.DIRECTORY)

    def started(self, report: Report) -> None: ...
    def collecting(self) -> None: ...

    def step(self, index: int, count: int, command: str) -> None:
        self.steps.append(index)

    def log(self, text: str) -> None:
        self.text += text
        self.heard.set()

    def job(self, *steps: str, source: dict[str, bytes] | None = None, **changes: Any) -> Job:
        path = self.folder / f"source-{secrets.token_hex(4)}.tar"
        with tarfile.open(path, "w") as tar:
            for name, content in (source or {"hello": b"hello\n"}).items():
                member = tarfile.TarInfo(name)
                member.size, member.mtime, member.mode = len(content), 1_000_000_000, 0o755
                tar.addfile(member, io.BytesIO(content))
        values: dict[str, Any] = {
            "build": secrets.token_hex(4),
            "name": "p-1",
            "steps": steps,
            "env": {},
            "outputs": (),
            "source": path,
            "environment": None,
            "set_clock": None,
            "expected_clock": time.time,
            "timeout_s": 60.0,
            "max_silent_s": 60.0,
            "keep_failed": False,
        }
        return Job(**values | changes)

    async def run(self, job: Job) -> Report:
        tar = self.folder / "outputs.tar"
        tar.unlink(missing_ok=True)
        with open_outputs_receiver(tar) as outputs:
            return await run_plain_build(self.guest, job, outputs, self)

    def unpack(self) -> dict[str, str]:
        """The outputs: names, and what is in the files."""
        target = self.folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        unpack_outputs(self.folder / "outputs.tar", target)
        found = sorted(target.rglob("*"))
        return {str(path.relative_to(target)): path.read_text() if path.is_file() else "" for path in found}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    made.chmod(0o755)
    (made / "builds").mkdir()
    # Not where builds of a real guest on this host would be.
    monkeypatch.setattr(plain, "DIRECTORY", str(made / "builds/build"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    async with open_bridge() as opened:
        yield opened


@pytest.fixture(params=SYSTEMS)
async def case(request: pytest.FixtureRequest, folder: Path, bridge: Bridge) -> AsyncIterator[Case]:
    user = pwd.getpwuid(os.geteuid()).pw_name
    (folder / "home").mkdir()
    remote = start(folder, user, folder / "home", f"PATH={make_path(folder, request.param)}")
    try:
        async with open_remote(bridge, remote.machine) as guest:
            yield Case(folder, remote, guest)
    finally:
        stop(remote)


@pytest.fixture
def processes() -> Callable[[str], list[int]]:
    def find(mark: str) -> list[int]:
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark.encode() in (directory / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
        return found

    return find


async def test_a_build(case: Case) -> None:
    steps = (
        "pwd; echo $HOME $GREETING $OFFLOAD_BUILD $TZ; cat",
        "mkdir out; tr a-z A-Z <hello >out/hello; echo noise >&2",
    )
    job = case.job(*steps, env={"GREETING": 'it\'s a "good" day'}, outputs=("out",))
    report = await case.run(job)
    assert (report.exit_status, report.failed_step, report.missing_outputs) == (0, 0, ())
    top = case.top
    assert case.text == f'{top}/p-1\n{top} it\'s a "good" day {job.build} UTC\nnoise\n'
    assert case.steps == [1, 2]
    assert case.unpack() == {"out": "", "out/hello": "HELLO\n"}
    assert abs(report.started["clock"] - time.time()) < 60
    assert report.started["kernel"] == os.uname().release
    assert report.clock_end is not None
    assert report.clock_end >= report.started["clock"]
    assert not top.exists()
    assert list((case.folder / "home").iterdir()) == []


async def test_its_programs_are_those_of_that_system(case: Case) -> None:
    report = await case.run(case.job("command -v python3 bwrap perl || ls /proc/self >/dev/null; exit 4"))
    assert (report.exit_status, case.text) == (4, "")


async def test_a_step_that_fails_ends_it(case: Case) -> None:
    report = await case.run(case.job("echo one >made", "false; echo on", "echo three", outputs=("made",)))
    assert (report.exit_status, report.failed_step, case.steps) == (1, 2, [1, 2])
    assert (case.folder / "outputs.tar").read_bytes() == b""
    assert not case.top.exists()


@pytest.mark.parametrize(("step", "status"), [("exit 255", 255), ("kill -s KILL $$", 137), ("no-such-program", 127)])
async def test_how_a_step_ends(case: Case, step: str, status: int) -> None:
    assert (await case.run(case.job(step))).exit_status == status


async def test_the_directory_of_a_build_that_failed(case: Case) -> None:
    report = await case.run(case.job("mkdir -p a/.b; echo c >a/.b/c; exit 3", outputs=("none",), keep_failed=True))
    assert (report.exit_status, report.missing_outputs) == (3, ())
    assert case.unpack() == {"a": "", "a/.b": "", "a/.b/c": "c\n", "hello": "hello\n"}


async def test_outputs_of_any_name(case: Case) -> None:
    step = (
        "mkdir -p out/deep/er; touch -- -rf.o ' a .o' '\n.o' '*.o' \"$(printf '\\377').o\" out/deep/er/x.o .hidden.o no.c;"
        " ln -s /etc/passwd out/away; ln -s deep out/near; ln no.c out/hard; ln no.c out/hard2; mkfifo out/fifo;"
        " touch out/deep/--checkpoint-action=exec=false; printf x >'$(touch injected)'"
    )
    (case.folder / "bin/mkfifo").symlink_to("/usr/bin/mkfifo")
    (case.folder / "bin/ln").symlink_to("/usr/bin/ln")
    (case.folder / "bin/printf").symlink_to("/usr/bin/printf")
    job = case.job(step, outputs=("*.o", "out", "**/x.o", "$(touch injected)", "[^a]o.c"))
    assert (await case.run(job)).exit_status == 0
    found = case.unpack()
    top = {name for name in found if "/" not in name}
    assert top == {"-rf.o", " a .o", "\n.o", "*.o", "\udcff.o", "no.c", "out", "$(touch injected)"}
    below = {"out/deep", "out/deep/er", "out/deep/er/x.o", "out/near", "out/hard", "out/hard2"}
    assert set(found) - top == below | {"out/deep/--checkpoint-action=exec=false"}
    assert "injected" not in found
    assert not (case.folder / "out/out/away").is_symlink()
    assert not (case.folder / "out/out/fifo").exists()


async def test_outputs_that_are_missing(case: Case) -> None:
    with pytest.raises(BuildFailedError, match=r"no file matches the outputs b/\*, \*\*/d$"):
        await case.run(case.job("mkdir b; touch a c", outputs=("a", "b/*", "c", "**/d")))


async def test_the_source_keeps_its_modes_and_dates(case: Case) -> None:
    umask = "umask; ls -ln hello; ls --version >/dev/null 2>&1 || true"
    report = await case.run(case.job(umask, outputs=("hello",)))
    assert report.exit_status == 0
    case.unpack()
    about = (case.folder / "out/hello").stat()
    assert (about.st_mtime, stat.S_IMODE(about.st_mode)) == (1_000_000_000, 0o755)
    assert case.text.startswith("0022\n")


async def test_what_goes_on_in_the_background_ends_with_its_step(case: Case, processes: Callable[[str], list[int]]) -> None:
    mark = f"9000.{secrets.randbelow(1 << 30)}"
    # One in its group, one that has left it; both hold the log open.
    leaves = f"setsid sleep {mark} & " if (case.folder / "bin/setsid").exists() else ""
    with trio.fail_after(30):
        report = await case.run(case.job(f"sleep {mark} & {leaves}sleep 0.1", "echo on"))
    assert (report.exit_status, case.text) == (0, "on\n")
    assert processes(mark) == []


@pytest.mark.parametrize("how", ["cancelled", "broken", "timeout"])
async def test_nothing_is_left(case: Case, how: str, processes: Callable[[str], list[int]]) -> None:
    mark = f"9000.{secrets.randbelow(1 << 30)}"
    leaves = f"setsid sleep {mark} & " if (case.folder / "bin/setsid").exists() else ""
    job = case.job(f"{leaves} sleep {mark} & echo begun; sleep {mark}", timeout_s=5.0 if how == "timeout" else 60.0)
    caught: list[Exception] = []

    async def run() -> None:
        try:
            await case.run(job)
        except (SshError, BuildTimeoutError) as exc:
            caught.append(exc)

    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await case.heard.wait()
            while not processes(mark):  # started, but not yet under its name
                await trio.sleep(0.02)
            if how == "cancelled":
                nursery.cancel_scope.cancel()
            elif how == "broken":
                kill_sessions(case.remote.process.pid)
        if how == "broken":
            while processes(mark) or case.top.exists():
                await trio.sleep(0.05)
    assert processes(mark) == []
    assert not case.top.exists()
    assert [type(exc) for exc in caught] == {"cancelled": [], "broken": [SshError], "timeout": [BuildTimeoutError]}[how]


async def test_a_directory_that_cannot_be_entered_is_removed_too(case: Case) -> None:
    report = await case.run(case.job("mkdir -p a/b; touch a/b/c; chmod 0 a/b; chmod 500 a"))
    assert report.exit_status == 0
    assert not case.top.exists()


async def test_two_at_a_time(case: Case) -> None:
    first = case.job("echo $HOME; touch ../gate; while [ -e ../gate ]; do sleep 0.05; done")
    second = case.job('rm "$GATE"; echo $HOME', env={"GATE": f"{case.top}/gate"})

    async def run_second() -> None:
        await case.heard.wait()
        while not (case.top / "gate").exists():
            await trio.sleep(0.02)
        other = Case(case.folder, case.remote, case.guest)
        tar = case.folder / "second.tar"
        with open_outputs_receiver(tar) as outputs:
            await run_plain_build(case.guest, second, outputs, other)
        case.text += other.text

    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_second)
            await case.run(first)
    assert case.text.split() == [str(case.top), f"{case.top}-{second.build}"]
    assert list((case.folder / "builds").iterdir()) == []


async def test_a_wrong_clock(case: Case) -> None:
    with pytest.raises(ProtocolError, match="the build was not started"):
        await case.run(case.job("touch made", expected_clock=lambda: time.time() + 1000))
    assert case.steps == []
    assert not case.top.exists()


async def test_too_much(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildTimeoutError, match="no output"):
        await case.run(case.job("sleep 50", max_silent_s=0.5))
    with pytest.raises(UsageError, match="longer than 100 kB"):
        await case.run(case.job("#" * 100_000))
    assert (await case.run(case.job(": " + "#" * 90_000 + "\nexit 3"))).exit_status == 3
    monkeypatch.setattr(course, "MAX_LOG_BYTES", 1 << 20)
    with pytest.raises(BuildFailedError, match="log is larger"):
        await case.run(case.job("while :; do echo a lot of words; done"))
    monkeypatch.setattr(plain, "MAX_NAMES_BYTES", 100)
    names = "for a in 1 2 3 4 5 6 7 8 9; do for b in 1 2 3 4 5 6 7 8 9; do : >a$a$b; done; done"
    with pytest.raises(BuildFailedError, match="too many files"):
        await case.run(case.job(names, outputs=("a*",)))
    assert not case.top.exists()


async def test_a_source_that_cannot_be_unpacked(case: Case) -> None:
    job = case.job("true")
    job.source.write_bytes(b"x" * 3_000_000)
    with trio.fail_after(30), pytest.raises(SshError, match="cannot unpack the source: tar"):
        await case.run(job)
    assert not case.top.exists()


async def test_no_place_for_a_build(case: Case) -> None:
    (case.folder / "builds").rmdir()
    with trio.fail_after(30), pytest.raises(SshError, match="has no room for a build: mkdir"):
        await case.run(case.job("true"))
    (case.folder / "builds").mkdir()


INSTALLER = """#!/bin/sh
echo "asked: $SSH_ORIGINAL_COMMAND" >&2
head -c 9000000 /dev/zero
sort >&2
exit $(cat STATUS)
"""


@pytest.mark.parametrize("status", [0, 1])
async def test_packages_are_installed_by_root_s_one_command(folder: Path, bridge: Bridge, status: int) -> None:
    (folder / "status").write_text(str(status))
    (folder / "installer").write_text(INSTALLER.replace("STATUS", str(folder / "status")))
    (folder / "installer").chmod(0o755)
    (folder / "home").mkdir()
    me = pwd.getpwuid(os.geteuid()).pw_name
    remote, said = start(folder, me, folder / "home", f"ForceCommand {folder}/installer"), list[str]()
    try:
        async with open_remote(bridge, remote.machine) as root:
            with trio.fail_after(30):
                if status:
                    with pytest.raises(BuildFailedError, match="cannot install what the build needs: exit status 1") as caught:
                        await install_packages(root, ("gcc", "bison (>= 3)"), said.append)
                    assert caught.value.detail.endswith("bison (>= 3)\ngcc")
                else:
                    await install_packages(root, ("gcc", "bison (>= 3)"), said.append)
    finally:
        stop(remote)
    told = "installing 2 packages and what they need with the guest's apt\n"
    assert "".join(said) == f"{told}asked: install-packages\nbison (>= 3)\ngcc\n"
