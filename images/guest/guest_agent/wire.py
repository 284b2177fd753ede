"""Frames of the agent's protocol, version 1, cut from what comes and packed to be sent."""

VERSION = 1
MAGIC = b"offload-agent %d " % VERSION
MAX_PAYLOAD = 64 * 1024
WINDOW = 256 * 1024
"""Bytes that may be under way on a channel, each way, before the other side says that it has taken some."""
HEAD = 9
SESSION = 32
HELLO = b"H" + bytes(4) + (len(MAGIC) + SESSION).to_bytes(4, "big") + MAGIC

KINDS = b"HRIiKXCW"
"""What a host sends: hello, run, input, end of input, signal, close, call, window."""


def pack(kind, channel, payload=b""):
    return b"%c%s%s%s" % (kind, channel.to_bytes(4, "big"), len(payload).to_bytes(4, "big"), payload)


class Cutter:
    """Cuts the host's bytes into frames.

    A host that was killed in the middle of a frame is followed by one that cannot know it.  What is no frame is therefore skipped
    up to the next hello.
    """

    def __init__(self):
        self.waiting = bytearray()
        self.lost = False

    def feed(self, data):
        """The frames (kind, channel, payload) that `data` completes."""
        self.waiting += data
        waiting, at, frames = self.waiting, 0, []
        while True:
            if self.lost:
                found = waiting.find(HELLO, at)
                if found < 0:
                    # The beginning of a hello may be at the end of what is here.
                    at = max(at, len(waiting) - len(HELLO) + 1)
                    break
                self.lost, at = False, found
            if len(waiting) - at < HEAD:
                break
            size = int.from_bytes(waiting[at + 5 : at + 9], "big")
            if waiting[at] not in KINDS or size > MAX_PAYLOAD:
                self.lost = True
                continue
            end = at + HEAD + size
            if len(waiting) < end:
                break
            frames.append((waiting[at], int.from_bytes(waiting[at + 1 : at + 5], "big"), bytes(waiting[at + HEAD : end])))
            at = end
        del waiting[:at]
        return frames
