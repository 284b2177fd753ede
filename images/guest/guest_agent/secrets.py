"""Receive the machine's secrets from the host and install them below the root.

The protocol is that of Guix's (gnu build secret-service), version 0:
    guest -> host   (secret-service-server (version 0))
    host -> guest   (secrets (version 0) (files (("/name" SIZE MODE) ...)))CONTENTS...
without newlines or separators; then the host closes its side.  MODE is the decimal st_mode.

Unlike Guix's own receiver this one trusts nothing: either all files are installed or none, and a peer that stalls, lies about a
size or names a place outside the root is refused.
"""

import os
import select
import stat
import time

HELLO = b"(secret-service-server (version 0))"
MAX_HEADER = 64 * 1024
MAX_FILES = 1000
MAX_TOTAL = 64 * 1024 * 1024
PEER_TIMEOUT_S = 30.0
"""What one peer may take in all, so that one that drips a byte now and then does not use up everybody's time."""

BLANKS = b" \t\r\n\f"
ENDS_WORD = BLANKS + b'();"'
ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v", b"0": b"\0"}


class Refused(Exception):
    """The peer sent something that is not installed; the text has no contents of files in it."""


# The header


def read_text(data, at):
    """The string whose opening quote is at `at` - 1, and where the text goes on.  IndexError: it is not complete."""
    text = bytearray()
    while data[at] != 0x22:
        if data[at] != 0x5C:
            text.append(data[at])
            at += 1
            continue
        letter = data[at + 1 : at + 2]
        if letter == b"x":
            # Guile's reader takes exactly two digits, not R6RS's \xHHHH;.
            digits = data[at + 2 : at + 4]
            if len(digits) < 2:
                raise IndexError
            text.append(int(digits, 16))
            at += 4
        else:
            data[at + 1]
            text += ESCAPES.get(letter, letter)
            at += 2
    return text.decode("utf-8"), at + 1


def read_word(data, at):
    """The number or symbol at `at` (symbols as bytes), and where the text goes on."""
    start = at
    while data[at] not in ENDS_WORD:
        at += 1
    word = data[start:at]
    if word.isdigit():
        return int(word), at
    if word[:2] == b"#o":
        return int(word[2:], 8), at
    return word, at


def read_expression(data):
    """The first S-expression of `data` as nested lists, and its length in bytes.

    IndexError: it is not complete.  ValueError: it is none.
    """
    stack = []
    at = 0
    while True:
        byte = data[at]
        if byte in BLANKS:
            at += 1
        elif byte == 0x3B:
            while data[at] != 0x0A:
                at += 1
        elif byte == 0x28:
            stack.append([])
            at += 1
        elif not stack:
            raise ValueError("not a list")
        elif byte == 0x29:
            done = stack.pop()
            at += 1
            if not stack:
                return done, at
            stack[-1].append(done)
        else:
            item, at = read_text(data, at + 1) if byte == 0x22 else read_word(data, at)
            stack[-1].append(item)


def check_file(item):
    """(name, size, permission bits) of one entry of the header."""
    if not isinstance(item, list) or [type(field) for field in item] != [str, int, int]:
        raise Refused("an entry of the header is not a name, a size and a mode")
    name, size, mode = item
    parts = name.split("/")
    if parts[0] or len(parts) < 2 or any(part in ("", ".", "..") for part in parts[1:]) or "\0" in name:
        raise Refused(f"{name!r:.200} is not the absolute name of a file")
    if mode > 0o177777 or stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise Refused(f"{name!r:.200} has a mode that is not a regular file's: {mode:o}")
    return name, size, stat.S_IMODE(mode)


def check_header(expression):
    """The files that a header announces, each (name, size, mode)."""
    if len(expression) != 3 or expression[:2] != [b"secrets", [b"version", 0]]:
        raise Refused("not a header of secrets, version 0")
    field = expression[2]
    if not isinstance(field, list) or len(field) != 2 or field[0] != b"files" or not isinstance(field[1], list):
        raise Refused("the header lists no files")
    if len(field[1]) > MAX_FILES:
        raise Refused(f"{len(field[1])} files: more than {MAX_FILES}")
    files = [check_file(item) for item in field[1]]
    if len({name for name, _, _ in files}) < len(files):
        raise Refused("a name comes twice")
    if sum(size for _, size, _ in files) > MAX_TOTAL:
        raise Refused(f"more than {MAX_TOTAL} bytes in all")
    return files


# The peer


class Peer:
    """A stream from which reading ends in time: each read within `read_timeout_s`, all of them before `deadline`."""

    def __init__(self, descriptor, read_timeout_s, deadline):
        self.descriptor = descriptor
        self.read_timeout_s = read_timeout_s
        self.deadline = deadline
        self.left = b""

    def receive(self, size):
        """At most `size` bytes, none at the end."""
        if self.left:
            piece, self.left = self.left[:size], self.left[size:]
            return piece
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        limit_s = max(0.001, min(self.read_timeout_s, self.deadline - time.monotonic()))
        if not poll.poll(limit_s * 1000):
            raise Refused("the peer is silent for too long")
        return os.read(self.descriptor, size)

    def read_header(self):
        data = bytearray()
        while len(data) <= MAX_HEADER:
            piece = self.receive(4096)
            if not piece:
                raise Refused(f"the header is cut off after {len(data)} bytes")
            data += piece
            # Only a closing parenthesis can complete it: peers that send single bytes cost no parsing.
            if b")" not in piece:
                continue
            try:
                expression, length = read_expression(bytes(data))
            except IndexError:
                continue
            except ValueError as exc:
                raise Refused("the header is not understood") from exc
            if length > MAX_HEADER:
                break
            self.left = bytes(data[length:])
            return check_header(expression)
        raise Refused(f"the header is longer than {MAX_HEADER} bytes")

    def copy(self, size, descriptor):
        while size:
            piece = self.receive(min(size, 65536))
            if not piece:
                raise Refused(f"the files are cut off: {size} bytes are missing")
            size -= len(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]


# Installing


def parent_inside(root, name):
    """The real directory that `name` goes to; refused when links on the way lead out of `root`."""
    real_root = os.path.realpath(root)
    parent = os.path.realpath(real_root + os.path.dirname(name))
    if os.path.commonpath([real_root, parent]) != real_root:
        raise Refused(f"{name!r:.200} leads out of the root")
    return parent


def make_directories(path, made):
    """Make `path` and its missing parents, noting them in `made`."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        os.mkdir(directory)
        made.append(directory)
        # sshd reads authorized_keys.d as the user who logs in.
        os.chmod(directory, 0o755)  # noqa: S103


def place(staged, target, kept):
    """Put the file `staged` at `target`; what was there is kept as `kept`, to be put back when a later file fails."""
    try:  # noqa: SIM105  contextlib is slow to import
        os.link(target, kept, follow_symlinks=False)
    except FileNotFoundError:
        pass
    os.rename(staged, target)


def place_all(root, stage, files):
    """Move the staged files to their places: all of them, or none."""
    made, done = [], []
    try:
        targets = []
        for name, _, _ in files:
            parent = parent_inside(root, name)
            make_directories(parent, made)
            targets.append(os.path.join(parent, os.path.basename(name)))
        for target in targets:
            if os.path.isdir(target) and not os.path.islink(target):
                raise Refused(f"{target!r:.200} is a directory here")
        if len(set(targets)) < len(targets):
            raise Refused("two names lead to the same file")
        for number, target in enumerate(targets):
            place(f"{stage}/{number}", target, f"{stage}/old-{number}")
            done.append((target, f"{stage}/old-{number}"))
    except (OSError, Refused):
        for target, kept in reversed(done):
            os.rename(kept, target) if os.path.lexists(kept) else os.unlink(target)
        for directory in reversed(made):
            os.rmdir(directory)
        raise


def receive_secrets(peer, root):
    """Take the files from `peer` and install them below `root`; the number of them."""
    files = peer.read_header()
    stage = os.path.join(root, ".secrets-" + os.urandom(8).hex())
    os.mkdir(stage, 0o700)
    try:
        for number, (_, size, mode) in enumerate(files):
            descriptor = os.open(f"{stage}/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                peer.copy(size, descriptor)
                os.fchmod(descriptor, mode)
            finally:
                os.close(descriptor)
        if peer.receive(1):
            raise Refused("more bytes than the header announces")
        place_all(root, stage, files)
    finally:
        for name in os.listdir(stage):
            os.unlink(os.path.join(stage, name))
        os.rmdir(stage)
    return len(files)


def say(text):
    os.write(2, b"secret-service: " + text.encode("utf-8", "backslashreplace") + b"\n")


def main(arguments):
    """Install what comes on standard input below the directory that the one argument names, or `/`; 0 when that is done."""
    os.umask(0o077)
    os.write(1, HELLO)
    try:
        peer = Peer(0, PEER_TIMEOUT_S, time.monotonic() + PEER_TIMEOUT_S)
        say(f"installed {receive_secrets(peer, arguments[0] if arguments else '/')} files")
    except (Refused, OSError) as exc:
        say(f"refused: {exc}")
        return 1
    return 0
