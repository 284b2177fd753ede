"""What a host has and whether builds can run there, found out as `guix offload status` and `test` do.

A remote host is hostile: what it says is bounded and checked before any of it is used or shown.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from offloadd.errors import ProtocolError, SshError
from offloadd.model.quantity import format_duration
from offloadd.place import far_side
from offloadd.vm.console import clean

PROBE_S = 30.0
"""For a probe, and again for a file there and back: Python starts in more than a second in an emulated machine."""
EXCHANGED = 256 * 1024
"""Bytes of the file that is sent there and back."""
MAX_TIME = 1 << 37
"""In seconds since 1970: the year 6325.  A guest may claim any, and Python's dates end in 9999."""
CLOCK_TOLERANCE_S = 120.0
"""A clock that is further off would be refused at the start of a build."""
OLDEST_PYTHON = (3, 9)
MAX_ANSWER = 64 * 1024

# The program on the command line, which reads the other one from standard input.  Whatever shell the user has there must leave
# it as it is, so it has no single quotes, no newlines and no exclamation marks.
_BOOT = (
    'import sys,os;sys.version_info>=(3,9) or sys.exit(\\"Python %d.%d\\" % sys.version_info[:2])\\n'
    "def read(n):\\n"
    " d=bytes()\\n"
    " while len(d)<n: d+=os.read(0,n-len(d)) or sys.exit(1)\\n"
    " return d\\n"
    "exec(read(int(sys.argv[1])))"
)


class FarProcess(Protocol):
    """A program there: `offloadd.guest.ssh.GuestProcess`."""

    async def send(self, data: bytes) -> None: ...
    async def receive(self) -> bytes: ...
    async def receive_error(self) -> bytes: ...
    async def wait(self) -> int: ...


class Shell(Protocol):
    """Where programs can be started: `offloadd.guest.ssh.Guest`."""

    def open_process(self, command: str) -> AbstractAsyncContextManager[FarProcess]: ...


Explain = Callable[[int, bytes, str], SshError]
"""Exit status, last words and the machine's name -> what that means."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One host, looked at."""

    clock_offset_s: float
    """What its clock is ahead of what it should show; less than zero when it is behind."""
    load: float | None
    """Of the last minute, for each core; this and what follows is None where a host without Python does not tell it."""
    cores: int
    memory_mib: int | None
    """Available."""
    disk_free: int | None
    """Bytes, where builds are kept."""
    kernel: str
    machine: str
    """Its processor in Linux's words (`uname -m`)."""
    python: str = ""
    """`3.11`"""
    sandbox: str = ""
    """Why bubblewrap does not work there; empty when it does."""

    @property
    def fault(self) -> str:
        """Why no build can run there; empty when one can."""
        return self.sandbox or self.clock_fault

    @property
    def clock_fault(self) -> str:
        """Why its clock is not good enough to build by; empty when it is."""
        if abs(self.clock_offset_s) <= CLOCK_TOLERANCE_S:
            return ""
        return f"its clock is {format_offset(self.clock_offset_s)}"


def format_offset(seconds: float) -> str:
    """`0.3s behind`, `3m05s ahead`."""
    return f"{format_duration(abs(seconds))} {'behind' if seconds < 0 else 'ahead'}"


async def probe_ssh(shell: Shell, machine: str, clock: Callable[[], float] = time.time) -> Probe:
    """Look at the host that `shell` is a login on.

    Args:
        machine: its name, for errors.
        clock: what its clock should show.
    Raises:
        SshError: it has no Python that will do, or the connection broke.
        ProtocolError: it did not say what a probe says.
    """
    async with _far_side(shell, machine, "look") as process:
        answer = await _read(process, MAX_ANSWER)
        received = clock()
        if len(answer) > MAX_ANSWER:
            raise ProtocolError(f"said more than {MAX_ANSWER >> 10} KiB of itself", subject=machine)
        await _check_end(process, machine, far_side_error)
        return parse_probe(answer, received, machine)


def probe_local(folder: Path) -> Probe:
    """Look at this host; `folder` is where builds are kept.  Blocks for some milliseconds.

    Raises:
        OSError: /proc is not what it should be.
    """
    now = time.time()
    found = far_side.look(str(folder)) | {"time": now}
    return parse_probe(json.dumps(found).encode(), now, "this host")


def parse_probe(answer: bytes, received: float, machine: str) -> Probe:
    """What `far_side.look` printed, checked.

    Args:
        received: what its clock should have shown at that moment.
    Raises:
        ProtocolError: it is not what a probe says.
    """
    try:
        found = json.loads(answer.decode())
    except (ValueError, RecursionError) as exc:
        hint = "does its shell print something when nobody is logged in at a terminal?"
        raise ProtocolError("says of itself what is not JSON", subject=machine, hint=hint) from exc
    if not isinstance(found, dict):
        raise ProtocolError("says of itself what is no JSON object", subject=machine)
    fields = _Fields(found, machine)
    cores = int(fields.number("cores", 1, 1 << 20))
    version = found.get("python")
    return Probe(
        clock_offset_s=round(fields.number("time", 0, MAX_TIME) - received, 3),
        load=round(fields.number("load", 0, 1 << 30) / cores, 4),
        cores=cores,
        memory_mib=int(fields.number("memory_mib", 0, 1 << 40)),
        disk_free=int(fields.number("disk_free", 0, 1 << 70)),
        kernel=fields.text("kernel"),
        machine=fields.text("machine"),
        python=clean(".".join(map(str, version[:2])))[:20] if isinstance(version, list) else "",
        sandbox=fields.text("sandbox"),
    )


class _Fields:
    """The fields of what a hostile host says."""

    def __init__(self, found: dict[str, Any], machine: str) -> None:
        self._found = found
        self._machine = machine

    def number(self, name: str, least: float, most: float) -> float:
        value = self._found.get(name)
        # Python's JSON has NaN, Infinity and numbers that no float holds; and a bool is an int.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
            return float(value)
        raise ProtocolError(f"says of itself {name}: {clean(repr(value)[:100])}", subject=self._machine)

    def text(self, name: str) -> str:
        value = self._found.get(name)
        if not isinstance(value, str):
            raise ProtocolError(f"says of itself {name}: {clean(repr(value)[:100])}", subject=self._machine)
        return " ".join(clean(value[:200].encode(errors="replace").decode()).split())


async def exchange_file(shell: Shell, machine: str, size: int = EXCHANGED) -> float:
    """Send a file of random bytes to where builds are kept, and get it back; the seconds that it took.

    Raises:
        SshError: it cannot be written there, or the connection broke.
        ProtocolError: what came back is something else.
    """
    async with _far_side(shell, machine, "exchange", str(size)) as process:
        return await _there_and_back(process, machine, size, far_side_error)


async def send_and_get_back(shell: Shell, command: str, machine: str, size: int) -> float:
    """The same through a command of the shell's.

    Args:
        command: takes `size` bytes from its standard input and gives them back.
    Raises:
        SshError, ProtocolError: as `exchange_file`.
    """
    async with _in_time(machine), shell.open_process(command) as process:
        return await _there_and_back(process, machine, size, program_error)


async def ask_shell(shell: Shell, command: str, machine: str) -> bytes:
    """What a command prints, at most little more than `MAX_ANSWER` bytes.

    Raises:
        SshError: it failed or gave no answer in time, or the connection broke.
        ProtocolError: it said more than that.
    """
    async with _in_time(machine), shell.open_process(command) as process:
        answer = await _read(process, MAX_ANSWER)
        if len(answer) > MAX_ANSWER:
            raise ProtocolError(f"said more than {MAX_ANSWER >> 10} KiB of itself", subject=machine)
        await _check_end(process, machine, program_error)
        return answer


async def _there_and_back(process: FarProcess, machine: str, size: int, explain: Explain) -> float:
    sent = os.urandom(size)
    began = trio.current_time()
    # Whoever has ended already has said why, which is read next.
    with suppress(SshError):
        await process.send(sent)
    back = await _read(process, size)
    await _check_end(process, machine, explain)
    if back != sent:
        raise ProtocolError("gave back another file than was sent", subject=machine)
    return trio.current_time() - began


def far_side_command(*words: str) -> str:
    """The shell's command that runs `far_side.main(words)`; it expects `far_side_program()` on its standard input first."""
    return f"exec python3 -IS -c 'exec(\"{_BOOT}\")' {len(far_side_program())} {shlex.join(words)}"


@functools.cache
def far_side_program() -> bytes:
    """The program itself."""
    return Path(far_side.__file__).read_bytes()


@asynccontextmanager
async def _far_side(shell: Shell, machine: str, *words: str) -> AsyncIterator[FarProcess]:
    async with _in_time(machine), shell.open_process(far_side_command(*words)) as process:
        # A program that has ended already has said why, which is read next.
        with suppress(SshError):
            await process.send(far_side_program())
        yield process


@asynccontextmanager
async def _in_time(machine: str) -> AsyncIterator[None]:
    with trio.move_on_after(PROBE_S) as limit:
        yield
    if limit.cancelled_caught:
        raise SshError(f"gave no answer within {format_duration(PROBE_S)}", subject=machine)


async def _read(process: FarProcess, limit: int) -> bytes:
    """All of its output, but not much more than `limit` bytes of it."""
    data = b""
    while len(data) <= limit and (piece := await process.receive()):
        data += piece
    return data


async def _check_end(process: FarProcess, machine: str, explain: Explain) -> None:
    """Raise what is wrong when the program did not end well."""
    said = b""
    while len(said) < 4096 and (piece := await process.receive_error()):
        said += piece
    status = await process.wait()
    if status:
        raise explain(status, said, machine)


def far_side_error(status: int, said: bytes, machine: str) -> SshError:
    """What it means that Python there ended with `status` and these last words."""
    words = _last_words(said)
    least = ".".join(map(str, OLDEST_PYTHON))
    if status == 127:
        hint = f"install Python {least} or newer there, and bubblewrap; nothing else is needed"
        return SshError("has no python3", subject=machine, detail=words, hint=hint)
    if words.startswith("Python "):
        return SshError(f"has {words.splitlines()[0]}, too old for builds", subject=machine, hint=f"Python {least} or newer")
    return program_error(status, said, machine)


def program_error(status: int, said: bytes, machine: str) -> SshError:
    """What it means that any program there did."""
    words = _last_words(said)
    last = words.splitlines()[-1] if words else "it said nothing"
    return SshError(f"a program failed there with status {status}: {last}", subject=machine, detail=words)


def _last_words(said: bytes) -> str:
    return clean(said[-4096:].decode(errors="replace")).strip()
