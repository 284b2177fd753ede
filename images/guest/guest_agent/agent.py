"""The loop: the port on one side, programs on the other; nothing in it waits for one of them alone.

    guest-agent [PORT] [again]

PORT is the number of a descriptor that is open; by default the virtio-serial port named org.offload.agent is opened.
again: an earlier agent of this guest has ended.
"""

import os
import select
import time

from build_service import service
from build_service.frames import parse_json, to_json

from guest_agent import secrets, sshd
from guest_agent.calls import CALLS
from guest_agent.port import Port, find_port
from guest_agent.program import Program, fork, spawn
from guest_agent.wire import answer_hello

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
MAX_UNSENT = 128 * 1024
"""Bytes for the host above which no program's output is read."""
MAX_ERROR = 1000
BUILT_IN = {"build-service": service.main, "secrets": secrets.main, "sshd": sshd.main}


def to_error(exc):
    return to_json({"error": f"{type(exc).__name__}: {exc}"[:MAX_ERROR]}).encode()


class Agent:
    def __init__(self, port):
        self.port = port
        self.programs = {}
        self.dropped = []
        """Programs that the host does not want any more, until they end."""

    # What the host says

    def take(self, kind, channel, payload):
        program = self.programs.get(channel)
        if kind == "H":
            self.begin_session(payload)
        elif kind == "C":
            self.port.send("A", channel, self.answer(payload))
        elif kind == "R":
            self.run(channel, payload)
        elif program is None:
            # It has ended while this was under way.
            return
        elif kind == "I":
            self.feed(channel, program, payload)
        elif kind == "i":
            program.no_more_input = True
            self.feed(channel, program, b"")
        elif kind == "K":
            program.signal(int.from_bytes(payload, "big"))
        elif kind == "W":
            program.credit += int.from_bytes(payload, "big")
        elif kind == "X":
            self.drop(channel)
            self.port.send("x", channel, b'{"error":"closed"}')

    def begin_session(self, payload):
        """A host that has just connected knows nothing of what an earlier one has started."""
        for channel in list(self.programs):
            self.drop(channel)
        self.port.forget()
        self.port.send("h", 0, answer_hello(payload))

    def answer(self, payload):
        try:
            given = parse_json(payload.decode())
            return to_json(CALLS[given["call"]](given)).encode()
        except Exception as exc:
            # The host is told, whatever it is.
            return to_error(exc)

    def run(self, channel, payload):
        try:
            given = parse_json(payload.decode())
            name, arguments = given["program"], given["arguments"]
            built_in = BUILT_IN.get(name)
            start = fork(lambda: built_in(arguments)) if built_in else spawn([name, *arguments], ENVIRONMENT)
            self.programs[channel] = Program(start)
        except Exception as exc:
            # The host is told, whatever it is.
            self.port.send("x", channel, to_error(exc))

    def feed(self, channel, program, data):
        went = program.feed(data)
        if went:
            self.port.send("W", channel, went.to_bytes(4, "big"))

    def drop(self, channel):
        program = self.programs.pop(channel)
        program.hang_up()
        self.dropped.append(program)

    # What programs say

    def copy(self, channel, program, ready):
        """Send some of its output.  Of one that has ended it is read until there is none: others may hold its pipes."""
        for descriptor, kind in list(program.outputs.items()):
            if program.credit and (descriptor in ready or program.last_words is not None):
                data = program.read(descriptor)
                if data:
                    self.port.send(kind, channel, data)

    def finish(self, channel, program):
        """It has ended, and all that it has said is sent."""
        del self.programs[channel]
        status = program.reap()
        program.close()
        self.port.send("x", channel, to_json({"status": status}).encode())

    # The loop

    def has_room(self):
        return self.port.unsent < MAX_UNSENT

    def ends_now(self):
        """Whether the last words of a program are to be read, be there any or not."""
        ended = [program for program in self.programs.values() if program.last_words is not None and program.credit]
        return bool(ended) and self.has_room()

    def watched(self):
        """What to wait for: descriptor -> events."""
        wanted = {self.port.descriptor: select.POLLIN | (select.POLLOUT if self.port.unsent else 0)}
        has_room = self.has_room()
        for program in self.programs.values():
            if program.waiting:
                wanted[program.input] = select.POLLOUT
            if has_room and program.credit:
                wanted.update(dict.fromkeys(program.outputs, select.POLLIN))
            if program.last_words is None:
                wanted[program.ended] = select.POLLIN
        for program in self.dropped:
            wanted[program.ended] = select.POLLIN
        return wanted

    def work(self, ready):
        for channel, program in list(self.programs.items()):
            if program.input in ready:
                self.feed(channel, program, b"")
            if program.ended in ready:
                program.end()
            if self.has_room():
                self.copy(channel, program, ready)
            if program.last_words is not None and not program.outputs:
                self.finish(channel, program)
        for program in [program for program in self.dropped if program.ended in ready]:
            self.dropped.remove(program)
            program.reap()
            program.close()

    def serve(self):
        while True:
            poll = select.poll()
            for descriptor, events in self.watched().items():
                poll.register(descriptor, events)
            ready = dict(poll.poll(0 if self.ends_now() else None))
            on_port = ready.pop(self.port.descriptor, 0)
            self.work(ready)
            frames = self.port.receive() if on_port & (select.POLLIN | select.POLLHUP) else []
            for frame in frames or ():
                self.take(*frame)
            self.port.flush()
            if frames is None:
                # Without a host the port is at its end, and ready, all the time.
                time.sleep(0.05)


def main(arguments):
    os.umask(0o022)
    numbers = [int(word) for word in arguments if word.isdecimal()]
    Agent(Port(numbers[0] if numbers else find_port(), "again" in arguments)).serve()
