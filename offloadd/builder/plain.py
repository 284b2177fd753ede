"""One build over SSH with what a guest has of its own: a POSIX shell, grep, find, GNU tar and the basic utilities.

For guests without our build service, and without the Python and the Linux that it needs: GNU/Hurd.

    guard   as long as its channel is open the build has somebody who wants it; then it ends what the build started, and removes
            its directory
    step    one channel for each: its output is the log, its exit status the step's

There is no sandbox: a build sees the guest, as the user whom we log in as.  Who wants it apart from others gives it a guest of
its own.  A process of the build is known by its group and by the variable OFFLOAD_BUILD; one that leaves its group and forgets
its variables on purpose is not found.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import trio

from offloadd.builder.course import Course
from offloadd.builder.job import Job, Listener, Report
from offloadd.builder.outputs import MAX_MEMBERS, OutputsReceiver
from offloadd.builder.patterns import OutputPattern
from offloadd.builder.tar import END, MAX_NAME
from offloadd.errors import BuildFailedError, SshError, UsageError
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.console import clean

DIRECTORY = "/tmp/build"  # noqa: S108 - made anew, or another one is taken
"""Where builds are: always the same, for what is built may well have it in it.  The second at a time gets one of its own."""
END_S = 20.0
"""For the guard to end a build in a machine that lives on."""
MAX_COMMAND = 100_000
"""Bytes of a step: Linux's limit for one argument is 128 KiB (execve(2), MAX_ARG_STRLEN)."""
MAX_NAMES_BYTES = 64 << 20
"""Of the names of all outputs together."""
_MAX_GREETING = 64 * 1024
_PIECE = 64 * 1024
_LAST_WORDS = 4096
_NAMES_AT_ONCE = 1000

# $1: the number of a process group, as a file of the build's directory says; $2: the build.  Each round finds the children that
# were started while the last one killed their parents.
_END = """
end() {
  case $1 in ''|*[!0-9]*|0|1) ;; *) kill -s KILL "-$1" 2>/dev/null;; esac
  round=0
  while [ "$round" -lt 50 ]; do
    left=$(grep -lsF "OFFLOAD_BUILD=$2" /proc/[0-9]*/environ 2>/dev/null)
    [ "$left" ] || break
    for file in $left; do file=${file#/proc/}; kill -s KILL "${file%/environ}" 2>/dev/null; done
    round=$((round + 1))
  done
}
"""
# $1, $2: directories, of which the first that can be made is taken; $3: the build; $4: a word of ours, after which the one
# that was made is named: a shell that is logged in to may print something of its own.
_GUARD = f"""{_END}
trap '' HUP INT TERM
umask 077
mkdir "$1" 2>/dev/null && top=$1 || {{ mkdir "$2" && top=$2; }} || exit 1
echo "$4 $top"
cat >/dev/null
end "$(cat "$top/group" 2>/dev/null)" "$3"
cd /
rm -rf "$top" 2>/dev/null || {{ chmod -R u+rwx "$top"; rm -rf "$top"; }}
"""
# $1: the directory that the guard has made; $2: the build directory's name in it; $3: the build; $4: the step; then variables.
# A process group of its own, which setsid makes where there is one, and else a shell with job control.  Where its number cannot
# be noted the guard has gone already.
_STEP = f"""{_END}
top=$1 build=$3 step=$4
cd "$top/$2" || exit 1
shift 4
umask 022
set -- env -i "HOME=$top" "PATH=$PATH" "USER=$USER" "LOGNAME=$LOGNAME" "$@" "OFFLOAD_BUILD=$build" sh -e -c "$step"
if command -v setsid >/dev/null 2>&1; then setsid "$@" </dev/null 2>&1 & else set -m; "$@" </dev/null 2>&1 & fi
group=$!
echo "$group" >"$top/group" || kill -s KILL "-$group"
wait "$group"
status=$?
end "$group" "$build"
exit "$status"
"""
_UNPACK = 'mkdir "$1" && cd "$1" && exec tar -xpof -'
_LIST = r'cd "$1" && exec find . \( -type f -o -type d -o -type l \) -print0'
_PACK = 'cd "$1" && exec tar --create --null --no-recursion --hard-dereference --files-from=- --file=-'
_FACTS = "uname -s; uname -r; date +%s"

_ENVIRONMENT = {"LANG": "C.UTF-8", "TZ": "UTC", "TERM": "dumb"}


class PlainProcess(Protocol):
    """A program there: `offloadd.guest.ssh.GuestProcess`."""

    async def send(self, data: bytes) -> None: ...
    async def send_eof(self) -> None: ...
    async def receive(self) -> bytes: ...
    async def receive_error(self) -> bytes: ...
    async def wait(self) -> int: ...


class PlainShell(Protocol):
    """A login: `offloadd.guest.ssh.Guest`."""

    def open_process(self, command: str) -> AbstractAsyncContextManager[PlainProcess]: ...
    async def run(self, command: str) -> tuple[int, bytes]: ...


async def run_plain_build(
    shell: PlainShell, job: Job, outputs: OutputsReceiver, listener: Listener, *, thrown_away: bool = False
) -> Report:
    """Run the job; its outputs are in `outputs` afterwards.  The job's personality, network and disks are the guest's affair.

    Args:
        thrown_away: the guest ends with the build, so that nothing in it need be put in order.
    Returns:
        The report, also when a step failed: `exit_status` is not zero then.
    Raises:
        BuildTimeoutError: the build took or was silent for too long.
        BuildFailedError: it succeeded, but outputs are missing or cannot be read; or its log or they are too large.
        ProtocolError: the guest shows a wrong clock.
        SshError: the connection broke, or the guest lacks what is needed.
        UsageError: a step is too long for a command line.
    """
    course = Course(job, listener)
    commands = [_step_arguments(job, step) for step in job.steps]
    with course.limited():
        async with _open_directory(shell, job, course, wait=not thrown_away) as top:
            build = _PlainBuild(shell, job, course, top)
            await build.unpack()
            course.start(await build.facts())
            await build.run_steps(commands)
            await build.collect(outputs)
    course.finish()
    return course.report


def _command(script: str, *arguments: str) -> str:
    """For whatever shell the user has there."""
    return f"exec sh -c {shlex.join([script, 'sh', *arguments])}"


def _step_arguments(job: Job, step: str) -> tuple[str, ...]:
    variables = _ENVIRONMENT | job.env
    arguments = (job.build, step, *(f"{name}={value}" for name, value in variables.items()))
    if len(shlex.join(arguments).encode()) > MAX_COMMAND:
        raise UsageError(f"a step and its variables are longer than {MAX_COMMAND // 1000} kB", hint="a script in the source")
    return arguments


@asynccontextmanager
async def _open_directory(shell: PlainShell, job: Job, course: Course, *, wait: bool) -> AsyncIterator[str]:
    """The build's own directory, which is gone after the block with all that runs for it.

    Args:
        wait: until it is.
    Raises:
        SshError: it cannot be made.
    """
    own, mark = f"{DIRECTORY}-{job.build}", f"offload-guard-{job.build}"
    async with shell.open_process(_command(_GUARD, DIRECTORY, own, job.build, mark)) as guard:
        top = await _read_greeting(guard, mark)
        if top not in (DIRECTORY, own):
            said = await _read_errors(guard, course)
            raise course.broken(f"the guest has no room for a build: {_last_line(said)}", error=SshError)
        try:
            yield top
        finally:
            if wait:
                with trio.move_on_after(END_S, shield=True), suppress(SshError):
                    await guard.send_eof()
                    await guard.wait()


async def _read_greeting(guard: PlainProcess, mark: str) -> str:
    """What the guard says after `mark`; empty when it says no such thing."""
    said = b""
    while len(said) <= _MAX_GREETING and (piece := await guard.receive()):
        said += piece
        for line in said.decode(errors="replace").splitlines(keepends=True):
            if line.startswith(mark) and line.endswith("\n"):
                return line.removeprefix(mark).strip()
    return ""


async def _read_errors(process: PlainProcess, course: Course) -> bytes:
    """The end of what it says on standard error."""
    said = b""
    while piece := await process.receive_error():
        course.add_error(piece)
        said = (said + piece)[-_LAST_WORDS:]
    return said


def _last_line(said: bytes) -> str:
    lines = clean(said.decode(errors="replace")).strip().splitlines()
    return lines[-1][:300] if lines else "it does not say why"


class _PlainBuild:
    """A build with a directory of its own, `top`."""

    def __init__(self, shell: PlainShell, job: Job, course: Course, top: str) -> None:
        self._shell = shell
        self._job = job
        self._course = course
        self._top = top
        self._directory = f"{top}/{job.name}"

    async def unpack(self) -> None:
        async def send(process: PlainProcess) -> None:
            async with await trio.open_file(self._job.source, "rb") as file:
                while piece := await file.read(_PIECE):
                    await process.send(piece)

        status, said = await self._run(_command(_UNPACK, self._directory), _ignore, send)
        if status:
            raise self._course.broken(f"the guest cannot unpack the source: {_last_line(said)}", error=SshError)

    async def facts(self) -> dict[str, Any]:
        """The guest's kernel and clock.  What it says is bounded and not believed."""
        _, said = await self._shell.run(_FACTS)
        # The shell may print something of its own before.
        lines = ["", "", "", *clean(said.decode(errors="replace")).split("\n")]
        system, kernel, clock = (line.strip()[:200] for line in lines[-4:-1])
        return {"system": system, "kernel": kernel, "clock": int(clock) if clock.isdecimal() and len(clock) < 20 else clock}

    async def run_steps(self, commands: Iterable[tuple[str, ...]]) -> None:
        """Up to the first that fails."""
        status = number = 0
        for number, arguments in enumerate(commands, 1):
            self._course.begin_step(number)
            status, _ = await self._run(_command(_STEP, self._top, self._job.name, *arguments), self._course.log)
            if status:
                break
        # A connection that broke looks like a step that ended with 255: then this fails.
        self._course.exit(status, number, await self.facts())

    async def collect(self, outputs: OutputsReceiver) -> None:
        """Bring back what is wanted of the build directory."""
        report, job = self._course.report, self._job
        if report.exit_status and not job.keep_failed:
            return
        wanted = [OutputPattern(text) for text in (["."] if report.exit_status else job.outputs)]
        names = _Names(wanted)
        status, said = await self._run(_command(_LIST, self._directory), names.take)
        if status:
            raise self._course.not_packed(_last_line(said))
        if not report.exit_status:
            report.missing_outputs = tuple(pattern for pattern in job.outputs if pattern not in names.matched)
        if names.chosen:
            await self._pack(sorted(names.chosen), outputs)
        else:
            outputs.write(END)
        outputs.finish()

    async def _pack(self, names: list[bytes], outputs: OutputsReceiver) -> None:
        async def send(process: PlainProcess) -> None:
            for at in range(0, len(names), _NAMES_AT_ONCE):
                # With the dot before it none is an option of tar's.
                await process.send(b"".join(b"./" + name + b"\0" for name in names[at : at + _NAMES_AT_ONCE]))

        status, said = await self._run(_command(_PACK, self._directory), outputs.write, send)
        if status:
            raise self._course.not_packed(_last_line(said))

    async def _run(
        self, command: str, take: Callable[[bytes], None], send: Callable[[PlainProcess], Awaitable[None]] | None = None
    ) -> tuple[int, bytes]:
        """The exit status of one program and the end of its standard error; its output goes to `take`."""
        said = b""

        async def feed() -> None:
            # One that ended without reading all of it has said why.
            with suppress(SshError):
                if send is not None:
                    await send(process)
                await process.send_eof()

        async def read_errors() -> None:
            nonlocal said
            said = await _read_errors(process, self._course)

        async with self._shell.open_process(command) as process, open_narrow_nursery() as nursery:
            nursery.start_soon(feed)
            nursery.start_soon(read_errors)
            while piece := await process.receive():
                take(piece)
            status = await process.wait()
        return status, said


def _ignore(data: bytes) -> None:
    """Nothing is expected there."""


class _Names:
    """Takes a list of names that are each followed by a zero byte, and keeps those that are wanted."""

    def __init__(self, wanted: list[OutputPattern]) -> None:
        self.chosen: list[bytes] = []
        self.matched: set[str] = set()
        """The texts of the patterns that anything fits."""
        self._wanted = wanted
        self._rest = b""
        self._bytes = 0

    def take(self, data: bytes) -> None:
        """Some more of it.

        Raises:
            BuildFailedError: it is too much.
        """
        *names, self._rest = (self._rest + data).split(b"\0")
        if len(self._rest) > MAX_NAME + len("./"):
            raise BuildFailedError("a name in the build directory is too long")
        for name in names:
            self._take_name(b"" if name == b"." else name.removeprefix(b"./"))

    def _take_name(self, name: bytes) -> None:
        found = [pattern.text for pattern in self._wanted if pattern.covers(os.fsdecode(name))]
        self.matched.update(found)
        if not (found and name):
            return
        self.chosen.append(name)
        self._bytes += len(name)
        if self._bytes > MAX_NAMES_BYTES or len(self.chosen) > MAX_MEMBERS:
            raise BuildFailedError("the outputs are too many files")
