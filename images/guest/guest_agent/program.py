"""A program that the host has started: its process, its three streams and how much of them may be under way."""

import _signal
import fcntl
import os

from guest_agent.wire import PIECE, WINDOW

F_SETPIPE_SZ = 1031


class Program:
    """Its ends of the pipes do not block."""

    def __init__(self, start):
        """Start a process: `start(stdin, stdout, stderr)` gives its number."""
        (stdin, self.input), (output, stdout), (error, stderr) = os.pipe(), os.pipe(), os.pipe()
        self.outputs = {output: "O", error: "E"}
        try:
            for descriptor in (self.input, output, error):
                os.set_blocking(descriptor, False)
                try:  # noqa: SIM105  contextlib is slow to import
                    fcntl.fcntl(descriptor, F_SETPIPE_SZ, WINDOW)
                except OSError:
                    # More than this user may have: it goes in smaller pieces.
                    pass
            self.ended = None
            self.pid = start(stdin, stdout, stderr)
            self.ended = os.pidfd_open(self.pid)
        except BaseException:
            self.close()
            raise
        finally:
            for descriptor in (stdin, stdout, stderr):
                os.close(descriptor)
        self.waiting = bytearray()
        """Input that its pipe had no room for."""
        self.no_more_input = False
        self.credit = WINDOW
        """Bytes of output that the host takes."""
        self.last_words = None
        """After its end: how much is still read.  What it has left running may go on writing for ever."""

    def feed(self, data):
        """Write input; the number of bytes that are not under way any more."""
        if self.waiting or not data:
            self.waiting += data
            data, self.waiting = self.waiting, bytearray()
        went = 0
        try:
            while went < len(data) and self.input is not None:
                went += os.write(self.input, data[went:] if went else data)
        except BlockingIOError:
            self.waiting += data[went:]
            return went
        except OSError:
            # It does not read any more.
            self.close_input()
        if self.no_more_input:
            self.close_input()
        # What nobody reads goes nowhere.
        return len(data)

    def close_input(self):
        if self.input is not None:
            os.close(self.input)
            self.input = None

    def read(self, descriptor):
        """Some of its output; empty when it waits, or at the end, when the descriptor is closed."""
        try:
            data = os.read(descriptor, min(PIECE, self.credit))
            at_end = not data
        except BlockingIOError:
            data, at_end = b"", self.last_words is not None
        self.credit -= len(data)
        if self.last_words is not None:
            self.last_words -= len(data)
            at_end = at_end or self.last_words <= 0
        if at_end:
            del self.outputs[descriptor]
            os.close(descriptor)
        return data

    def signal(self, number):
        """To the process and all that it has started in its session's group."""
        try:  # noqa: SIM105  contextlib is slow to import
            os.killpg(self.pid, number)
        except (OSError, OverflowError):
            # It has just ended; or there is no such signal.
            pass

    def end(self):
        """It has ended: what it has said is in the pipes now."""
        self.last_words = len(self.outputs) * WINDOW

    def reap(self):
        """The exit status; 128+N after signal N."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code if code >= 0 else 128 - code

    def hang_up(self):
        """Nobody wants it: it sees its input's end and a hang-up, as when a terminal is closed."""
        self.signal(_signal.SIGHUP)
        self.close_input()
        self.close_outputs()

    def close_outputs(self):
        for descriptor in self.outputs:
            os.close(descriptor)
        self.outputs = {}

    def close(self):
        self.close_input()
        self.close_outputs()
        if self.ended is not None:
            os.close(self.ended)
            self.ended = None


def spawn(argv, environment):
    """How to start the program `argv[0]`: in a session of its own."""

    def start(stdin, stdout, stderr):
        moves = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate((stdin, stdout, stderr))]
        # Not fork: it copies the page tables of all that is loaded here, which costs under emulation.
        return os.posix_spawnp(
            argv[0], argv, environment, file_actions=moves, setsid=True, setsigdef=[_signal.SIGPIPE, _signal.SIGXFSZ]
        )

    return start


def fork(function):
    """How to start a function of what is loaded here: no program has to be read, linked and translated first."""

    def start(stdin, stdout, stderr):
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            os.setsid()
            for number, end in enumerate((stdin, stdout, stderr)):
                os.dup2(end, number)
            # Those of the agent and of its other programs: whoever waits for one of them to close must not wait for us.
            os.closerange(3, 4096)
            status = function() or 0
        except BaseException as exc:
            os.write(2, f"{type(exc).__name__}: {exc}\n".encode("utf-8", "backslashreplace"))
        finally:
            os._exit(status)

    return start
