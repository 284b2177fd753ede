"""A program that the host has started: its process, its three streams and how much of them may be under way."""

import _signal
import fcntl
import os
import select

from guest_agent.wire import WINDOW

PIECE = 64 * 1024
F_SETPIPE_SZ = 1031


class Program:
    """Its ends of the pipes do not block."""

    def __init__(self, start):
        """Start a process: `start(stdin, stdout, stderr)` gives its number."""
        ends = [os.pipe(), os.pipe(), os.pipe()]
        try:
            self.pid = start(ends[0][0], ends[1][1], ends[2][1])
            self.ended = os.pidfd_open(self.pid)
        except BaseException:
            for pair in ends:
                os.close(pair[0])
                os.close(pair[1])
            raise
        for descriptor in (ends[0][0], ends[1][1], ends[2][1]):
            os.close(descriptor)
        self.input, self.output, self.error = ends[0][1], ends[1][0], ends[2][0]
        for descriptor in (self.input, self.output, self.error):
            os.set_blocking(descriptor, False)
            fcntl.fcntl(descriptor, F_SETPIPE_SZ, WINDOW)
        self.waiting = bytearray()
        """Input that its pipe had no room for."""
        self.no_more_input = False
        self.credit = WINDOW
        """Bytes of output that the host takes."""

    def descriptors(self):
        return [descriptor for descriptor in (self.input, self.output, self.error, self.ended) if descriptor is not None]

    def outputs(self):
        return [descriptor for descriptor in (self.output, self.error) if descriptor is not None]

    def says_more(self):
        """Whether something is in its output pipes now."""
        poll = select.poll()
        for descriptor in self.outputs():
            poll.register(descriptor, select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))

    def feed(self, data):
        """Note more input; more than a window is more than an honest host sends."""
        self.waiting += data

    def flush(self):
        """Write as much input as fits; the number of bytes that went."""
        went = 0
        try:
            while self.waiting and self.input is not None:
                size = os.write(self.input, self.waiting[:PIECE])
                del self.waiting[:size]
                went += size
        except BlockingIOError:
            return went
        except OSError:
            # It does not read any more: what the host still sends goes nowhere.
            went += len(self.waiting)
            self.close_input()
            return went
        if self.no_more_input:
            self.close_input()
        return went

    def close_input(self):
        self.waiting.clear()
        if self.input is not None:
            os.close(self.input)
            self.input = None

    def signal(self, number):
        """To the process and all that it has started in its session's group."""
        try:
            os.killpg(self.pid, number)
        except OSError:
            # It has just ended.
            pass

    def reap(self):
        """The exit status; 128+N after signal N."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code if code >= 0 else 128 - code

    def close(self):
        for descriptor in self.descriptors():
            os.close(descriptor)
        self.input = self.output = self.error = self.ended = None


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
            status = function()
        except BaseException as exc:
            os.write(2, f"{type(exc).__name__}: {exc}\n".encode("utf-8", "backslashreplace"))
        finally:
            os._exit(status)

    return start
