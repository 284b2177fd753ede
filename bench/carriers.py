"""Ways to carry a tree of files into a running guest and out of it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from bench.loads import Load
from bench.login import Login
from bench.measure import BenchError
from bench.program import time_to_end
from offloadd.guest.agent import Agent
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.instance import Instance

LIMIT_S = 400.0
"""For one tree in one direction."""
THERE = "/tmp/carried"  # noqa: S108 - in the guest
_PIECE = 1 << 20
# What our builds' source disks are made with.
_SQFSTAR = "sqfstar -quiet -no-progress -noI -noD -noF -noX -no-duplicates"
# The shell finds it without starting a process; `read` fails, as there is no end of line, and reads all the same.
_FIND = 'for d in /sys/block/vd*; do s=; read -r s <$d/serial; [ "$s" = "$1" ] && break; done; d=/dev/${d##*/};'
# What a build's end runs in the guest; its events go to whoever started it.
_OUTPUTS = f"""
import os, sys
sys.path.insert(0, "/usr/lib/offload")
from build_service.disks import open_scratch
from build_service.outputs import OutputStream, send_outputs
stream = OutputStream(open_scratch("/sys", sys.argv[1]))
os.chdir("{THERE}")
send_outputs([sys.argv[2]], stream)
"""


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """One way to carry trees."""

    name: str
    put: Callable[[Load], Awaitable[object]]
    """The load's folder becomes `THERE/<its name>` in the guest."""
    get: Callable[[Load, Path], Awaitable[object]]
    """That comes back below a directory on the host."""
    settle: Callable[[Load], Awaitable[object]] | None = None
    """Between the two, and not timed: it comes back from where the others have put it."""
    clean: Callable[[Load], Awaitable[object]]
    """Nothing of it is left in the guest."""
    target: float | None = None
    """At most this much of the time that `tar | ssh` takes for one large file."""
    foreign: bool = False


def ssh_carriers(login: Login) -> tuple[Carrier, Carrier]:
    """`tar | ssh` and `scp`, which everybody has."""
    ssh = shlex.join(login.ssh)

    async def shell(script: str) -> None:
        await time_to_end(["sh", "-c", script], limit_s=LIMIT_S)

    async def tar_put(load: Load) -> None:
        parent, name = shlex.quote(str(load.folder.parent)), load.folder.name
        await shell(f"tar -c -C {parent} {name} | {ssh} tar -x -C {THERE}")

    async def tar_get(load: Load, back: Path) -> None:
        await shell(f"{ssh} tar -c -C {THERE} {load.folder.name} | tar -x -C {shlex.quote(str(back))}")

    async def scp_put(load: Load) -> None:
        await time_to_end([*login.scp, str(load.folder), f"{login.remote}{THERE}"], limit_s=LIMIT_S)

    async def scp_get(load: Load, back: Path) -> None:
        await time_to_end([*login.scp, f"{login.remote}{THERE}/{load.folder.name}", str(back)], limit_s=LIMIT_S)

    async def clean(load: Load) -> None:
        await shell(f"{ssh} rm -r {THERE}/{load.folder.name}")

    return (
        Carrier(name="tar | ssh", put=tar_put, get=tar_get, clean=clean),
        Carrier(name="scp", put=scp_put, get=scp_get, clean=clean, foreign=True),
    )


def agent_carrier(agent: Agent) -> Carrier:
    """Tars through the agent's port."""

    async def put(load: Load) -> None:
        async with _tar("-c", "-C", str(load.folder.parent), load.folder.name, stdout=subprocess.PIPE) as tar:
            assert tar.stdout is not None
            await agent.put(_pieces(tar.stdout), THERE)

    async def get(load: Load, back: Path) -> None:
        target = back / load.folder.name
        await trio.Path(target).mkdir()
        async with _tar("-x", "-C", str(target), stdin=subprocess.PIPE) as tar:
            assert tar.stdin is not None
            async with tar.stdin, agent.get(f"{THERE}/{load.folder.name}") as pieces:
                async for piece in pieces:
                    await tar.stdin.send_all(piece)

    async def clean(load: Load) -> None:
        await _run(agent, f"rm -r {THERE}/{load.folder.name}")

    return Carrier(name="the agent", put=put, get=get, clean=clean, target=1.0)


def disk_carrier(instance: Instance, agent: Agent, scratch: Path) -> Carrier:
    """In as a squashfs that the guest mounts, out as a tar that it writes to a disk, as it does for a build."""
    mounted: list[str] = []

    async def put(load: Load) -> None:
        disk, parent = scratch / "source.squashfs", shlex.quote(str(load.folder.parent))
        script = f"tar -c -C {parent} {load.folder.name} | {_SQFSTAR} {shlex.quote(str(disk))}"
        await time_to_end(["sh", "-c", script], limit_s=LIMIT_S)
        serial = await instance.attach_disk(disk)
        await trio.Path(disk).unlink()
        mounted.append(serial)
        await _run(agent, f"{_FIND} mkdir -p {THERE}/.disk; mount -t squashfs -o ro $d {THERE}/.disk", serial)
        await _run(agent, f"ln -s .disk/{load.folder.name} {THERE}/{load.folder.name}")

    async def settle(load: Load) -> None:
        await _run(agent, f"cd {THERE}; rm {load.folder.name}; cp -r .disk/{load.folder.name} .")

    async def get(load: Load, back: Path) -> None:
        disk = scratch / "outputs.tar"
        with disk.open("xb") as file:
            # Room for the headers too; what nobody writes to takes none.
            os.truncate(file.fileno(), 2 * load.size + (64 << 20))
        serial = await instance.attach_disk(disk, writable=True)
        await _run(agent, 'exec python3 -c "$@"', _OUTPUTS, serial, load.folder.name)
        await instance.detach_disk(serial)
        await time_to_end(["tar", "-x", "-f", str(disk), "-C", str(back)], limit_s=LIMIT_S)
        await trio.Path(disk).unlink()

    async def clean(load: Load) -> None:
        await _run(agent, f"umount {THERE}/.disk; rm -r {THERE}/.disk {THERE}/{load.folder.name}")
        await instance.detach_disk(mounted.pop())

    return Carrier(name="a disk", put=put, settle=settle, get=get, clean=clean, target=0.2)


async def _run(agent: Agent, script: str, *words: str) -> None:
    """Run a script in the guest, as root; BenchError when it fails."""
    with _in_time(script):
        status, said = await agent.run("/bin/sh", "-c", f"exec 2>&1; {script}", "sh", *words)
    if status:
        raise BenchError(f"in the guest: {script!r} ended with status {status}: {said.decode(errors='replace')[-300:]}")


@contextmanager
def _in_time(what: str) -> Iterator[None]:
    try:
        with trio.fail_after(LIMIT_S):
            yield
    except trio.TooSlowError as exc:
        raise BenchError(f"{what} took longer than {LIMIT_S:.0f} s") from exc


@asynccontextmanager
async def _tar(*arguments: str, **pipes: int) -> AsyncIterator[trio.Process]:
    """A `tar` on the host, which must have succeeded when the block ends.

    Raises:
        BenchError: it has not, or took too long.
    """
    # It reads and writes records as large as the guest's, to their end: a pipe that is closed too early is an error.
    argv = ["tar", "--blocking-factor=128", *arguments]
    try:
        with _in_time("tar on the host"):
            async with open_narrow_nursery() as nursery:
                yield await nursery.start(partial(trio.run_process, argv, **pipes))
    except (subprocess.CalledProcessError, trio.BrokenResourceError) as exc:
        raise BenchError(f"tar failed on the host: {exc}") from exc


async def _pieces(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    while piece := await stream.receive_some(_PIECE):
        yield bytes(piece)
