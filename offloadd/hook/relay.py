"""The real program behind a hook: what the build daemon says goes to it, what it says to the build daemon."""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PIECE = 1 << 16
MAX_LINE = 1 << 20

# signal(7).  The module of that name takes as long to load as the real program.
_SIGKILL, _SIGPIPE = 9, 13


class Input:
    """A file descriptor that is read piece by piece, and whose rest can be handed on."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._kept = b""
        self._at = 0
        """Where in it what was not asked for begins."""

    def line(self) -> bytes:
        """The next line with its newline; less at the end."""
        while (end := self._kept.find(b"\n", self._at)) < 0 and self._rest() < MAX_LINE and self._more():
            pass
        return self._take(self._rest() if end < 0 else end + 1 - self._at)

    def exactly(self, count: int) -> bytes:
        """So many bytes; `EOFError` when there are not as many."""
        while self._rest() < count:
            if not self._more():
                raise EOFError
        return self._take(count)

    def rest(self) -> bytes:
        """What has been read and not been asked for."""
        return self._take(self._rest())

    def _rest(self) -> int:
        return len(self._kept) - self._at

    def _more(self) -> bool:
        piece = os.read(self.fd, PIECE)
        self._kept, self._at = self._kept[self._at :] + piece, 0
        return bool(piece)

    def _take(self, count: int) -> bytes:
        begin, self._at = self._at, self._at + count
        return self._kept[begin : self._at]


class Real:
    """One process of the real program; its output and its errors are one, as they are for a hook.

    Args:
        outlet: the descriptor on which the build daemon listens.
    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], outlet: int) -> None:
        self._outlet = outlet
        theirs, self._to = os.pipe()
        self._from, their_out = os.pipe()
        try:
            actions = [
                (os.POSIX_SPAWN_DUP2, theirs, 0),
                (os.POSIX_SPAWN_DUP2, their_out, 1),
                (os.POSIX_SPAWN_DUP2, their_out, 2),
            ]
            # Further descriptors (4: the build's log) are inherited.  Python ignores SIGPIPE, which is inherited, too.
            self._pid = os.posix_spawn(argv[0], list(argv), environment, file_actions=actions, setsigdef=[_SIGPIPE])
        except OSError:
            os.close(self._to)
            os.close(self._from)
            raise
        finally:
            os.close(theirs)
            os.close(their_out)
        self._said = Input(self._from)

    def send(self, data: bytes) -> None:
        """Send it what fits into a pipe, or what it surely reads; nothing happens when it has ended."""
        try:
            write_all(self._to, data)
        except BrokenPipeError:
            return  # its reply, which is missing, says so

    def reply(self) -> bytes:
        """Its reply to a request, a line that begins with `# `; the lines before it are passed on.  Empty when it has ended."""
        while line := self._said.line():
            if line.startswith(b"# ") and line.endswith(b"\n"):
                return line
            write_all(self._outlet, line)
        return b""

    def relay(self, inlet: Input) -> int:
        """Pass everything on in both directions until it ends; its exit status."""
        write_all(self._outlet, self._said.rest())
        pending, open_inlet = inlet.rest(), True
        os.set_blocking(self._to, False)
        while True:
            # It may fill its output before it reads: whoever waits for one direction must not hold up the other.
            reading = [self._from] + ([inlet.fd] if open_inlet and not pending else [])
            readable, writable, _ = select.select(reading, [self._to] if pending else [], [])
            if writable:
                pending = self._write_some(pending)
            if inlet.fd in readable:
                pending = os.read(inlet.fd, PIECE)
                open_inlet = bool(pending)
            if not open_inlet and not pending:
                self._end_input()
            if self._from in readable:
                said = os.read(self._from, PIECE)
                if not said:
                    return self.close()
                write_all(self._outlet, said)

    def close(self) -> int:
        """End its input, pass on what it still says, and wait for its end; its exit status."""
        self._end_input()
        while piece := os.read(self._from, PIECE):
            write_all(self._outlet, piece)
        os.close(self._from)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return code if code >= 0 else 128 - code

    def abandon(self) -> None:
        """End it at once, whatever it does or says."""
        os.kill(self._pid, _SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._from)
        self._end_input()

    def _write_some(self, data: bytes) -> bytes:
        try:
            return data[os.write(self._to, data) :]
        except BlockingIOError:
            return data
        except BrokenPipeError:
            return b""

    def _end_input(self) -> None:
        if self._to >= 0:
            os.close(self._to)
            self._to = -1


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, however much a pipe takes at once."""
    while data:
        data = data[os.write(fd, data) :]


def find_program(name: str, variable: str, *wrappers: str) -> str:
    """The path of the real program: what `variable` of the environment says, else the first of PATH that is no wrapper of ours.

    Raises:
        FileNotFoundError: there is none.
    """
    if chosen := os.environ.get(variable):
        return chosen
    for folder in [*(os.environ.get("PATH") or os.defpath).split(os.pathsep), "/usr/bin", "/usr/local/bin"]:
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK) and os.path.isfile(path) and not any(_same(path, wrapper) for wrapper in wrappers):
            return path
    raise FileNotFoundError(f"{name} is not in PATH; {variable} may say where it is")


def execute(argv: Sequence[str]) -> None:
    """Become the real program."""
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execv(argv[0], list(argv))  # noqa: S606


def _same(path: str, other: str) -> bool:
    try:
        return bool(other) and os.path.samefile(path, other)
    except OSError:
        return False
