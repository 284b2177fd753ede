"""The agent in real guests, over a real virtio-serial port."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from offloadd.builder.outputs import open_outputs_receiver, unpack_outputs
from offloadd.daemon.guests import FreshGuest, Guests
from offloadd.daemon.workshop import Workshop, open_workshop
from offloadd.errors import AgentError
from offloadd.guest.agent import Agent
from offloadd.guest.open import open_guest, set_clock
from offloadd.model.machine import VmMachine
from offloadd.model.state import MachineState
from offloadd.paths import Paths
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.vm.record import Purpose

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"
DATE = datetime(2011, 12, 13, tzinfo=UTC)
LIMIT_S = 600.0
SH = "/bin/sh"


class Shop:
    """A workshop, and the plan of a small machine."""

    def __init__(self, shop: Workshop, machine: VmMachine, plan: VmPlan) -> None:
        self.guests = Guests(shop)
        self.machine = machine
        self._plan = plan
        self._logs = shop.paths.logs

    @asynccontextmanager
    async def guest(self, name: str, purpose: Purpose = "build") -> AsyncIterator[FreshGuest]:
        plan = replace(plan_for_build(self._plan, name, date=DATE, cpu=None, pinned_cpu=False), forwards=())
        logs = self._logs / name
        with trio.fail_after(LIMIT_S):
            async with self.guests.open(plan, self.machine, lambda *_: None, logs=logs, purpose=purpose) as guest:
                yield guest


@pytest.fixture(scope="module")
def paths() -> Iterator[Paths]:
    # Directly below /tmp: a socket's path holds 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    for name in ("config", "state", "run"):
        (root / name).mkdir(mode=0o700)
    yield Paths(config=root / "config", state=root / "state", cache=CACHE, runtime=root / "run")
    shutil.rmtree(root)


@pytest.fixture
async def shop(paths: Paths) -> AsyncIterator[Shop]:
    async with open_workshop(paths, paths.database) as opened:
        library = opened.library()
        machine = library.vm("build-vm").model_copy(update={"cpu_count": 2, "memory_size": 512, "secret_root": None})
        plan = await opened.plan(machine, library, lambda *_: None)
        yield Shop(opened, machine, plan)


async def shell(agent: Agent, script: str) -> str:
    status, output = await agent.run(SH, "-c", script)
    assert status == 0
    return output.decode().strip()


async def test_two_guests_are_two_machines(shop: Shop) -> None:
    look = "cat /etc/machine-id /sys/class/net/eth0/address; head -c 16 /dev/urandom | od -An -tx1; date +%s"
    # Of builds without the network nobody sees the addresses.
    async with shop.guest("first", "machine") as first, shop.guest("second", "machine") as second:
        seen = [(await shell(guest.agent, look)).splitlines() for guest in (first, second)]
    for one, other in zip(seen[0][:3], seen[1][:3], strict=True):
        assert one != other
    for identity, address, _, clock in seen:
        assert len(identity) == 32
        assert address.startswith("52:54:00:")
        assert 0 <= int(clock) - DATE.timestamp() < LIMIT_S


async def test_the_clock_is_set_and_read_back(shop: Shop) -> None:
    async with shop.guest("clock") as guest:
        for year in (1999, 2031):
            moment = datetime(year, 5, 6, tzinfo=UTC).timestamp()
            await set_clock(guest.agent, moment)
            assert 0 <= float((await guest.agent.call("clock"))["clock"]) - moment < 60
            assert await shell(guest.agent, "date +%Y") == str(year)


async def test_programs_and_signals(shop: Shop) -> None:
    async with shop.guest("programs") as guest:
        agent = guest.agent
        assert await agent.run(SH, "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n")
        async with agent.open_process(SH, "-c", "trap 'echo caught; exit 9' USR1; echo ready; sleep 60 & wait") as process:
            assert await process.receive() == b"ready\n"
            await process.signal(signal.SIGUSR1)
            assert await process.receive() == b"caught\n"
            assert await process.wait() == 9
        with pytest.raises(AgentError, match="cannot run a program: FileNotFoundError"):
            await agent.run("/bin/missing")
        # What nobody takes stands in nobody's way.
        async with agent.open_process("yes") as flood:
            assert (await flood.receive()).startswith(b"y\n")
            assert await shell(agent, "echo hello") == "hello"


async def in_pieces(path: Path) -> AsyncIterator[bytes]:
    async with await trio.open_file(path, "rb") as file:
        while piece := await file.read(1 << 18):
            yield piece


async def test_a_tree_there_and_back(shop: Shop, tmp_path: Path) -> None:
    sent, numbers = tmp_path / "sent", random.Random(4)
    files = {f"d{number % 20}/file {number}": numbers.randbytes(numbers.randrange(3000)) for number in range(1000)}
    files["big"] = numbers.randbytes(20 << 20)
    for name, content in files.items():
        (sent / name).parent.mkdir(parents=True, exist_ok=True)
        (sent / name).write_bytes(content)
        os.utime(sent / name, (1_700_000_000, 1_700_000_000))  # the guest's future
    (sent / "d0/link").symlink_to("../big")
    with tarfile.open(tmp_path / "sent.tar", "w") as tar:
        tar.add(sent, ".")

    async with shop.guest("tree") as guest:
        await shell(guest.agent, "mkdir /tmp/there")
        await guest.agent.put(in_pieces(tmp_path / "sent.tar"), "/tmp/there")
        with open_outputs_receiver(tmp_path / "back.tar") as receiver:
            async with guest.agent.get("/tmp/there") as pieces:
                async for piece in pieces:
                    receiver.write(piece)
        with pytest.raises(AgentError, match="tar ended with status") as caught:
            await guest.agent.put(in_pieces(tmp_path / "sent.tar"), "/proc")
        assert "Cannot" in caught.value.detail
    unpacked = await trio.to_thread.run_sync(unpack_outputs, tmp_path / "back.tar", tmp_path / "back")

    assert (unpacked.files, unpacked.left_out) == (len(files), ())
    for name, content in files.items():
        assert (tmp_path / "back" / name).read_bytes() == content
        assert (tmp_path / "back" / name).stat().st_mtime == 1_700_000_000
    assert (tmp_path / "back/d0/link").readlink() == Path("../big")


async def kill_agent(agent: Agent) -> None:
    """From inside, with output under way; the host learns of it."""
    async with agent.open_process(SH, "-c", "yes & sleep 1; kill -9 $PPID; wait") as process:
        with pytest.raises(AgentError, match="the agent ended, and was started again"):
            while await process.receive():
                pass
    await agent.wait_lost()
    with pytest.raises(AgentError, match="was started again"):
        await agent.call("clock")


STANDS_STILL = """
import sys, time
sys.path.insert(0, "/usr/lib/offload")
from build_service import clock
monotonic = time.monotonic
pauses = [0.5, 0.05]
def slow():
    now = monotonic()
    time.sleep(pauses.pop() if pauses else 0)
    return now
time.monotonic = slow
clock.set_clock(0)
time.monotonic = monotonic
print(len(pauses), 0 < time.time() - time.monotonic() < 5)
"""


async def test_a_guest_that_stands_still_can_be_set_to_1970(shop: Shop) -> None:
    async with shop.guest("slow") as guest:
        assert await shell(guest.agent, f"python3 -c {shlex.quote(STANDS_STILL)}") == "0 True"


async def test_removed_files_leave_their_inodes_to_the_next(shop: Shop) -> None:
    """Else each new file looks at those that were removed within minutes: a build that cleans up gets slower and slower."""
    script = """if True:
        import os, tempfile
        def make(folder):
            for number in range(2000):
                with open(f"{folder}/{number}", "w") as file:
                    file.write("content")
        with tempfile.TemporaryDirectory() as folder:
            make(folder)
            first = {entry.inode() for entry in os.scandir(folder)}
            os.sync()
            for entry in list(os.scandir(folder)):
                os.unlink(entry)
            make(folder)
            print(len(first - {entry.inode() for entry in os.scandir(folder)}))
    """
    async with shop.guest("files") as guest:
        assert await shell(guest.agent, f"python3 -c {shlex.quote(script)}") == "0"


async def test_an_agent_that_is_killed_comes_again(shop: Shop) -> None:
    async with shop.guest("killed") as guest:
        await kill_agent(guest.agent)
        for _ in range(2):
            async with open_guest(guest.instance, lambda _: None, adopted=True) as agent:
                assert await shell(agent, "echo hello") == "hello"
                await kill_agent(agent)


async def test_a_host_that_goes_away_in_the_middle(shop: Shop) -> None:
    """What it was sending and what was sent to it is lost, and what it ran is ended; the next one finds all in order."""
    async with shop.guest("left") as guest:
        async with guest.agent.open_process("yes"), guest.agent.open_process("cat") as process:
            with trio.move_on_after(1):
                while True:
                    await process.send(bytes(1 << 20))
            # As when it is killed: nothing is said any more.
            guest.agent._fail(AgentError("killed"))
        async with open_guest(guest.instance, lambda _: None, adopted=True) as agent:
            assert await shell(agent, "while pgrep -x 'yes|cat'; do sleep 1; done >/dev/null; echo none") == "none"


async def test_power_off(shop: Shop) -> None:
    async with shop.guest("ending") as guest:
        assert await guest.agent.call("power-off") == {}
        outcome = await guest.instance.wait_ended()
        assert outcome.state is MachineState.STOPPED_BY_GUEST
