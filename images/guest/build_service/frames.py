"""Frames and the JSON in them, on standard input and output; and what can go wrong."""

# Under emulation the module `json` costs half a second of every build: this is the C module below it.
import _json
import os
import select

MAX_PAYLOAD = 1 << 20
PIECE = 64 * 1024


class Trouble(Exception):
    """What the service could not do, as the host is told it."""


class Cancelled(Exception):
    """The host is gone or a signal came."""


def describe(exc):
    text = str(exc) if isinstance(exc, Trouble) else f"{type(exc).__name__}: {exc}"
    if isinstance(exc, OSError) and isinstance(exc.filename, (str, bytes)):
        text = f"{os.fsdecode(exc.filename)}: {exc.strerror}"
    # File names are bytes; the host gets text.
    return text.encode("utf-8", "backslashreplace").decode()


class _Reader:
    """What the interpreter's JSON scanner asks for."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def parse_json(text):
    try:
        value, end = _json.make_scanner(_Reader())(text, 0)
    except StopIteration:
        raise Trouble("the begin frame is not JSON") from None
    if text[end:].strip():
        raise Trouble("the begin frame has something after its JSON")
    return value


def to_json(value):
    """`value` (dict, list, str, int, float) as JSON text."""
    if isinstance(value, dict):
        return "{" + ",".join([f"{to_json(name)}:{to_json(item)}" for name, item in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_json, value)) + "]"
    return _json.encode_basestring_ascii(value) if isinstance(value, str) else repr(value)


def write_all(data):
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(1, rest) :]
        except BlockingIOError:
            # Whoever shares the other end of standard output may have made it non-blocking.
            poll = select.poll()
            poll.register(1, select.POLLOUT)
            poll.poll()


def send(kind, payload=b""):
    write_all(kind + len(payload).to_bytes(4, "big") + payload)


def send_event(event, **fields):
    payload = to_json({"event": event, **fields}).encode()
    send(b"E", payload if len(payload) <= MAX_PAYLOAD else b'{"event":"error","what":"an event is too long to be sent"}')


def read_exactly(size):
    data = bytearray()
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            raise Cancelled
        data += piece
    return bytes(data)


def read_frame():
    head = read_exactly(5)
    size = int.from_bytes(head[1:], "big")
    if size > MAX_PAYLOAD:
        raise Trouble(f"a frame of {size} bytes is too long")
    return head[:1], read_exactly(size)
