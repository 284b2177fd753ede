"""A guest without Python, looked at through a real sshd: with what POSIX names and coreutils has, and nothing else."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from offloadd.bridge import Bridge, open_bridge
from offloadd.daemon import probes as daemon_probes
from offloadd.daemon.machines import RunningMachine
from offloadd.daemon.probes import Probes
from offloadd.errors import OffloadError, ProtocolError, SshError
from offloadd.guest import ssh
from offloadd.guest.secret_root import ensure_secret_root
from offloadd.guest.ssh import open_remote
from offloadd.place import probe
from offloadd.place.plain_probe import exchange_plain, probe_plain
from offloadd.place.probe import Probe

from .real_sshd import SSHD
from .test_remote import Remote, start, stop
from .test_ssh import ME, free_port, start_sshd, wait_for

pytestmark = pytest.mark.skipif(SSHD is None, reason="openssh-server is not installed")
TOOLS = ("sh", "cat", "uptime", "nproc", "df", "uname", "date", "head", "rm")


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    async with open_bridge() as opened:
        yield opened


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def start_own(folder: Path) -> Iterator[Callable[..., Remote]]:
    """An sshd whose programs are those that are named, or that runs one command alone."""
    started = []

    def begin(*tools: str, command: str = "") -> Remote:
        (folder / "bin").mkdir()
        for tool in tools:
            found = shutil.which(tool)
            assert found
            (folder / "bin" / tool).symlink_to(found)
        setting = f"ForceCommand {command}" if command else f"PATH={folder}/bin"
        started.append(start(folder, pwd.getpwuid(os.geteuid()).pw_name, folder, setting))
        return started[-1]

    yield begin
    for one in started:
        stop(one)


async def test_a_guest_with_the_basic_utilities(start_own: Callable[..., Remote], bridge: Bridge, folder: Path) -> None:
    async with open_remote(bridge, start_own(*TOOLS).machine) as guest:
        status, _ = await guest.run("python3 --version")
        assert status == 127
        found = await probe_plain(guest, "hurd")
        assert abs(found.clock_offset_s) < 3
        assert found.load is not None
        assert found.load >= 0
        assert found.cores == len(os.sched_getaffinity(0))
        assert (found.memory_mib or 0) > 0
        assert abs((found.disk_free or 0) - shutil.disk_usage(folder).free) < 1 << 30
        assert (found.kernel, found.machine) == (f"{os.uname().sysname} {os.uname().release}", os.uname().machine)
        assert await exchange_plain(guest, "hurd", 3_000_000) > 0
    assert not list(folder.glob(".offload-exchange-*"))


async def test_a_guest_with_hardly_anything(start_own: Callable[..., Remote], bridge: Bridge) -> None:
    async with open_remote(bridge, start_own("sh", "date").machine) as guest:
        found = await probe_plain(guest, "hurd")
        assert abs(found.clock_offset_s) < 3
        assert (found.load, found.memory_mib, found.disk_free, found.kernel) == (None, None, None, "")
        with pytest.raises(SshError, match="a program failed there"):
            await exchange_plain(guest, "hurd", 1000)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("yes", "more than 64 KiB"),
        ("echo hello", "does not know what time it is"),
        ("exec sleep 1000", "no answer within"),
        ("head -c 100000000 /dev/zero >&2", "no answer within"),
        ("exit 3", "a program failed there with status 3"),
    ],
)
async def test_a_hostile_guest(
    command: str, words: str, start_own: Callable[..., Remote], bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_S", 3.0)
    async with open_remote(bridge, start_own(command=command).machine) as guest:
        with trio.fail_after(20), pytest.raises((ProtocolError, SshError), match=words):
            await probe_plain(guest, "hurd")


async def test_a_guest_that_gives_back_another_file(start_own: Callable[..., Remote], bridge: Bridge) -> None:
    async with open_remote(bridge, start_own(command="head -c 300000 /dev/zero").machine) as guest:
        with trio.fail_after(20), pytest.raises(ProtocolError, match="another file than was sent"):
            await exchange_plain(guest, "hurd", 300_000)


class FakeInstance:
    """What is asked of an instance: its port, and what its clock should show."""

    def __init__(self, port: int) -> None:
        self.ssh_port = port
        self.record = SimpleNamespace(clock=lambda: time.time() - 1000)


@pytest.fixture
def childhurd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningMachine]:
    """A machine without an agent that runs."""
    monkeypatch.setattr(ssh, "ACCOUNT", ME)
    running = RunningMachine("childhurd", None)
    running.secrets = ensure_secret_root("childhurd", folder / "secrets")
    port = free_port()
    running.instance = cast(Any, FakeInstance(port))
    process = start_sshd(folder, running.secrets, port)
    wait_for(port)
    yield running
    process.terminate()
    process.wait()


async def test_a_machine_that_runs_is_asked_and_remembered(childhurd: RunningMachine, bridge: Bridge) -> None:
    failed: list[str] = []
    probes = Probes(bridge, lambda name, error: failed.append(name))
    first = await probes.ask_guest(childhurd)
    assert isinstance(first, Probe)
    assert 995 < first.clock_offset_s < 1010
    assert first.load is not None
    assert await probes.ask_guest(childhurd) is first
    # Another instance of it has another clock and load.
    assert childhurd.instance is not None
    childhurd.instance = cast(Any, FakeInstance(childhurd.instance.ssh_port))
    second = await probes.ask_guest(childhurd)
    assert isinstance(second, Probe)
    assert second is not first
    assert failed == []


async def test_a_machine_that_is_silent_is_not_counted(
    childhurd: RunningMachine, bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_probes, "LIMIT_S", 0.5)
    childhurd.instance = cast(Any, FakeInstance(free_port()))
    failed: list[str] = []
    with trio.fail_after(10):
        answer = await Probes(bridge, lambda name, error: failed.append(name)).ask_guest(childhurd)
    assert isinstance(answer, OffloadError)
    assert "does not answer within" in answer.what
    assert failed == []
