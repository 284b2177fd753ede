"""The loop: the port on one side, programs on the other; nothing in it waits for one of them alone.

    guest-agent [PORT]

PORT is a character device or a socket's number; by default the virtio-serial port named org.offload.agent.
"""

import os
import select
import sys
import time

import _signal
from build_service import service
from build_service.frames import parse_json, to_json

from guest_agent import secrets, sshd
from guest_agent.calls import CALLS
from guest_agent.program import PIECE, Program, fork, spawn
from guest_agent.wire import MAGIC, MAX_PAYLOAD, Cutter, pack

PORT_NAME = "org.offload.agent"
PORTS = "/sys/class/virtio-ports"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
MAX_UNSENT = 128 * 1024
"""Bytes for the host above which no program's output is read."""
BUILT_IN = {"build-service": service.main, "secrets": secrets.main, "sshd": sshd.main}
PORT = 0
"""The channel of the port itself in the table of descriptors."""


class Agent:
    def __init__(self, port):
        self.port = port
        self.cutter = Cutter()
        self.unsent = bytearray()
        self.programs = {}
        self.closed = []
        """Programs that the host does not want any more, until they end."""
        os.set_blocking(port, False)

    # The port

    def send(self, kind, channel, payload=b""):
        self.unsent += pack(ord(kind), channel, payload)

    def flush(self):
        try:
            while self.unsent:
                del self.unsent[: os.write(self.port, self.unsent[:PIECE])]
        except BlockingIOError:
            pass
        except OSError:
            # Nobody is connected.
            self.unsent.clear()

    def receive(self):
        """Take what the host has sent; False when it is not connected."""
        pieces, size, connected = [], 0, True
        try:
            # The driver gives a page at a time.
            while size < PIECE:
                pieces.append(os.read(self.port, PIECE))
                size += len(pieces[-1])
                if not pieces[-1]:
                    connected = False
                    break
        except BlockingIOError:
            pass
        except OSError:
            connected = False
        for kind, channel, payload in self.cutter.feed(b"".join(pieces)):
            self.take(chr(kind), channel, payload)
        return connected

    def take(self, kind, channel, payload):
        program = self.programs.get(channel)
        if kind == "H":
            self.begin_session(payload)
        elif kind == "C":
            self.send("A", channel, self.answer(payload))
        elif kind == "R":
            self.run(channel, payload)
        elif program is None:
            # It has ended while this was under way.
            return
        elif kind == "I":
            program.feed(payload)
            self.feed(channel, program)
        elif kind == "i":
            program.no_more_input = True
            self.feed(channel, program)
        elif kind == "K":
            program.signal(int(payload))
        elif kind == "W":
            program.credit += int.from_bytes(payload, "big")
        elif kind == "X":
            self.drop(channel)

    def begin_session(self, payload):
        """A host that has just connected knows nothing of what an earlier one has started."""
        for channel in list(self.programs):
            self.drop(channel)
        self.unsent.clear()
        self.send("h", 0, MAGIC + payload[len(MAGIC) :])

    def answer(self, payload):
        try:
            given = parse_json(payload.decode())
            values = CALLS[given["call"]](given)
        except Exception as exc:
            # The host is told, whatever it is.
            values = {"error": f"{type(exc).__name__}: {exc}"}
        return to_json(values).encode()[:MAX_PAYLOAD]

    # Programs

    def run(self, channel, payload):
        try:
            given = parse_json(payload.decode())
            name, arguments = given["program"], given["arguments"]
            built_in = BUILT_IN.get(name)
            start = fork(lambda: built_in(arguments)) if built_in else spawn([name, *arguments], ENVIRONMENT)
            self.programs[channel] = Program(start)
        except Exception as exc:
            # The host is told, whatever it is.
            self.send("x", channel, to_json({"error": f"{type(exc).__name__}: {exc}"}).encode()[:MAX_PAYLOAD])

    def feed(self, channel, program):
        went = program.flush()
        if went:
            self.send("W", channel, went.to_bytes(4, "big"))

    def drop(self, channel):
        """End a program that nobody wants: it sees its input's end and a hang-up, as when a terminal is closed."""
        program = self.programs.pop(channel)
        program.signal(_signal.SIGHUP)
        for descriptor in (program.input, program.output, program.error):
            if descriptor is not None:
                os.close(descriptor)
        program.input = program.output = program.error = None
        self.closed.append(program)

    def copy(self, channel, program, descriptor, kind):
        """Send some of its output; False at the end of it."""
        try:
            data = os.read(descriptor, min(PIECE, program.credit, MAX_PAYLOAD))
        except BlockingIOError:
            return True
        if data:
            program.credit -= len(data)
            self.send(kind, channel, data)
        return bool(data)

    def read_output(self, channel, program, ready):
        if program.output in ready and not self.copy(channel, program, program.output, "O"):
            os.close(program.output)
            program.output = None
        if program.credit and program.error in ready and not self.copy(channel, program, program.error, "E"):
            os.close(program.error)
            program.error = None

    def finish(self, channel, program):
        """It has ended, and all that it has said is sent; what it left running may hold its output open for ever."""
        del self.programs[channel]
        status = program.reap()
        program.close()
        self.send("x", channel, to_json({"status": status}).encode())

    # The loop

    def watched(self):
        """What to wait for: descriptor -> events."""
        roomy = len(self.unsent) < MAX_UNSENT
        wanted = {self.port: select.POLLIN | (select.POLLOUT if self.unsent else 0)}
        for program in self.programs.values():
            if program.waiting:
                wanted[program.input] = select.POLLOUT
            # Its end is of interest when what it has said can be read.
            if roomy and program.credit:
                wanted.update(dict.fromkeys(program.outputs(), select.POLLIN))
                wanted[program.ended] = select.POLLIN
        for program in self.closed:
            wanted[program.ended] = select.POLLIN
        return wanted

    def work(self, ready):
        for channel, program in list(self.programs.items()):
            if program.input in ready:
                self.feed(channel, program)
            self.read_output(channel, program, ready)
            if program.ended in ready and not program.says_more():
                self.finish(channel, program)
        for program in [program for program in self.closed if program.ended in ready]:
            self.closed.remove(program)
            program.reap()
            program.close()

    def serve(self):
        while True:
            poll = select.poll()
            for descriptor, events in self.watched().items():
                poll.register(descriptor, events)
            ready = dict(poll.poll())
            on_port = ready.pop(self.port, 0)
            self.work(ready)
            connected = self.receive() if on_port & (select.POLLIN | select.POLLHUP) else True
            self.flush()
            if not connected:
                # Without a host the port is at its end, and ready, all the time.
                time.sleep(0.05)


def open_port():
    """The port, which is there when its driver is loaded."""
    while True:
        try:
            for port in os.listdir(PORTS):
                with open(f"{PORTS}/{port}/name") as file:
                    if file.read().strip() == PORT_NAME:
                        return os.open("/dev/" + port, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            pass
        time.sleep(0.02)


def main(arguments):
    os.umask(0o022)
    # Descriptors of programs are made with O_CLOEXEC by Python; the standard ones are the console's.
    port = open_port() if not arguments else int(arguments[0]) if arguments[0].isdecimal() else os.open(arguments[0], os.O_RDWR)
    try:
        Agent(port).serve()
    except KeyboardInterrupt:
        pass
    sys.exit(0)
