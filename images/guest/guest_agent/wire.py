"""Frames of the agent's protocol, version 1, cut from what comes and packed to be sent."""

VERSION = 1
NAME = b"offload-agent "
HELLO = NAME + b"%d " % VERSION
HEAD = 9
MAX_PAYLOAD = 64 * 1024
WINDOW = 256 * 1024
"""Bytes that may be under way on a channel, each way, before the other side says that it has taken some."""
PIECE = MAX_PAYLOAD - HEAD
"""Bytes of output in a frame: the kernel takes 32 KiB at a time, and so gets no third piece of 9 bytes."""

KINDS = b"HRIiKXCW"
"""What a host sends: hello, run, input, end of input, signal, close, call, window."""


# Sums, not formats: under emulation what a clone does once costs what its code is long.
def head(kind, channel, size):
    return kind.encode() + channel.to_bytes(4, "big") + size.to_bytes(4, "big")


def answer_hello(payload):
    """The answer to a hello, which ends with a word that the host has chosen."""
    return HELLO + payload.rpartition(b" ")[2]


class Cutter:
    """Cuts the host's bytes into frames.

    An earlier host, or an earlier agent, may have ended in the middle of a frame.  What is no frame is therefore skipped up to
    the next hello, whatever its version; and so is all that comes before the first one.
    """

    def __init__(self):
        self.waiting = bytearray()
        self.lost = True

    def feed(self, data):
        """The frames (kind, channel, payload) that `data` completes."""
        self.waiting += data
        waiting, at, frames = self.waiting, 0, []
        while True:
            if self.lost:
                found = waiting.find(NAME, at + HEAD)
                if found < 0:
                    # The beginning of a hello may be at the end of what is here.
                    at = max(at, len(waiting) - HEAD - len(NAME) + 1)
                    break
                self.lost, at = False, found - HEAD
            if len(waiting) - at < HEAD:
                break
            kind, size = waiting[at], int.from_bytes(waiting[at + 5 : at + HEAD], "big")
            if kind not in KINDS or size > MAX_PAYLOAD:
                self.lost = True
                at += 1
                continue
            end = at + HEAD + size
            if len(waiting) < end:
                break
            frames.append((chr(kind), int.from_bytes(waiting[at + 1 : at + 5], "big"), bytes(waiting[at + HEAD : end])))
            at = end
        del waiting[:at]
        return frames
