"""The port: what comes in as frames, what goes out as it has room."""

import os
import time

from guest_agent.wire import HEAD, MAX_PAYLOAD, Cutter, answer_hello, head

PORT_NAME = "org.offload.agent"
PORTS = "/sys/class/virtio-ports"
READY = "/run/offload-ready"
"""What PID 1 makes when the guest is set up: whoever is answered before that may find a build without its loopback."""
CHUNK = 4096
"""What QEMU puts into one buffer of the port: a read gives no more than that."""


class Port:
    def __init__(self, descriptor, again):
        """Args: again: an earlier agent was at this port, and has ended, perhaps in the middle of a frame."""
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        self.descriptor = descriptor
        self.cutter = Cutter()
        whole = memoryview(bytearray(16 * CHUNK))
        self.room = whole
        self.chunks = [whole[at : at + CHUNK] for at in range(0, len(whole), CHUNK)]
        self.forget()
        if again:
            # A host that listens waits for the rest of that frame, and for programs that nobody knows any more.
            self.queue.append(bytes(HEAD + MAX_PAYLOAD))
            self.unsent += HEAD + MAX_PAYLOAD
            self.send("h", 0, answer_hello(b""))

    def forget(self):
        """Nobody wants what was not sent yet."""
        self.queue = []
        self.going = memoryview(b"")
        """What the port is taking, before the queue."""
        self.unsent = 0
        """Bytes in both."""

    def send(self, kind, channel, payload):
        self.queue += (head(kind, channel, len(payload)), payload)
        self.unsent += HEAD + len(payload)

    def flush(self):
        """Hand over what there is room for."""
        try:
            while self.unsent:
                if not self.going:
                    self.going, self.queue = memoryview(b"".join(self.queue)), []
                size = os.write(self.descriptor, self.going)
                self.going = self.going[size:]
                self.unsent -= size
        except BlockingIOError:
            pass
        except OSError:
            # Nobody is there.
            self.forget()

    def receive(self):
        """The frames that have come; None when no host is connected."""
        try:
            # One call of the system for many buffers.
            size = os.readv(self.descriptor, self.chunks)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self.cutter.feed(self.room[:size]) if size else None


def find_port():
    """The port, when the guest is ready."""
    while True:
        try:
            for port in os.listdir(PORTS) if os.path.exists(READY) else ():
                with open(f"{PORTS}/{port}/name") as file:
                    if file.read().strip() == PORT_NAME:
                        return os.open("/dev/" + port, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            pass
        time.sleep(0.02)
