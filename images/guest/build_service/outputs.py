"""Packing the outputs: a tar in the formats ustar and pax (POSIX.1-2001, pax)."""

import os
import stat

from build_service.frames import PIECE, Trouble, send, send_event
from build_service.patterns import expand, tree
from build_service.porter import GROUP, USER
from build_service.source import BLOCK

BULK = 8 << 20
"""Bytes; what is more goes to a disk when there is one.  A multiple of its blocks."""
DISK_BLOCK = 4096
ENOSPC = 28
"""errno.h; the module is one more to import."""


def octal(number, digits):
    return b"%0*o\0" % (digits, min(max(int(number), 0), 8**digits - 1))


def tar_header(name, kind, mode, size, mtime, link=b""):
    """A ustar header; where its fields are too small, with an extended one before it."""
    records = b""
    for key, value, fits in (
        (b"path", name, len(name) <= 100),
        (b"linkpath", link, len(link) <= 100),
        (b"size", b"%d" % size, size < 8**11),
    ):
        if not fits:
            body = b" %s=%s\n" % (key, value)
            length = len(body) + len(b"%d" % (len(body) + 3))
            length = len(body) + len(b"%d" % length)
            records += b"%d%s" % (length, body)
    if records:
        extended = tar_header(b"pax", b"x", 0o644, len(records), 0)
        records = extended + records + bytes(-len(records) % BLOCK)
    owner = octal(USER, 7) + octal(GROUP, 7)
    fields = (name[:100].ljust(100, b"\0"), octal(mode, 7), owner, octal(size, 11), octal(mtime, 11), b" " * 8, kind)
    block = b"".join((*fields, link[:100].ljust(100, b"\0"), b"ustar\00000")).ljust(BLOCK, b"\0")
    return records + block[:148] + b"%06o\0 " % sum(block) + block[156:]


class OutputStream:
    """Where the tar goes: in frames; or, once it is more than BULK, to the disk of which `disk` is a descriptor.

    Made before the porter is in the build's root, where nothing can be imported.
    """

    def __init__(self, disk=None):
        self.disk = disk
        self.on_disk = 0
        self.filled = 0
        if disk is None:
            self.room = memoryview(bytearray(PIECE))
        else:
            from mmap import mmap

            # Memory that begins with a page, from which a disk can take it as it is.
            self.room = memoryview(mmap(-1, BULK))

    def space(self):
        """Where the next bytes go; whoever puts some there adds their number to `filled`."""
        if self.filled == len(self.room):
            self._empty()
        return self.room[self.filled :]

    def write(self, data):
        rest = memoryview(data)
        while rest:
            space = self.space()[: len(rest)]
            space[:] = rest[: len(space)]
            self.filled += len(space)
            rest = rest[len(space) :]

    def end(self):
        self.write(bytes(2 * BLOCK))
        if self.on_disk:
            size = self.on_disk + self.filled
            # A disk is written in whole blocks of its own.
            self.write(bytes(-self.filled % DISK_BLOCK))
            self._empty()
            os.fsync(self.disk)
            send_event("scratch", size=size)
        else:
            self._send()
        send(b"o")

    def _empty(self):
        if self.disk is None:
            self._send()
            return
        rest = self.room[: self.filled]
        while rest:
            try:
                rest = rest[os.write(self.disk, rest) :]
            except OSError as exc:
                if exc.errno == ENOSPC:
                    raise Trouble("they are larger than the disk for them") from None
                raise
        self.on_disk += self.filled
        self.filled = 0

    def _send(self):
        for at in range(0, self.filled, PIECE):
            send(b"O", bytes(self.room[at : min(at + PIECE, self.filled)]))
        self.filled = 0


def write_file(stream, path):
    # All of the build's processes are dead, but a fifo that they left must not stop us either.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        about = os.fstat(descriptor)
        stream.write(tar_header(path, b"0", about.st_mode & 0o777, about.st_size, about.st_mtime))
        left = about.st_size
        while left:
            count = os.readv(descriptor, [stream.space()[:left]])
            if not count:
                raise Trouble(f"{os.fsdecode(path)} got shorter while it was read")
            stream.filled += count
            left -= count
        stream.write(bytes(-about.st_size % BLOCK))
    finally:
        os.close(descriptor)


def write_member(stream, path):
    about = os.lstat(path)
    if stat.S_ISREG(about.st_mode):
        write_file(stream, path)
    elif stat.S_ISDIR(about.st_mode):
        stream.write(tar_header(path, b"5", about.st_mode & 0o777, 0, about.st_mtime))
    elif stat.S_ISLNK(about.st_mode):
        stream.write(tar_header(path, b"2", 0o777, 0, about.st_mtime, os.readlink(path)))


def send_outputs(patterns, stream):
    """Send what the patterns match in the current directory, and which of them match nothing."""
    chosen, missing = {}, []
    for pattern in patterns:
        parts = [part for part in os.fsencode(pattern).split(b"/") if part not in (b"", b".")]
        found = list(expand(parts))
        chosen.update(dict.fromkeys(found))
        if not found:
            missing.append(pattern)
    send_event("outputs", missing=missing)
    sent = set()
    for top in sorted(chosen):
        for path in tree(top):
            if path and path not in sent:
                sent.add(path)
                write_member(stream, path)
    stream.end()
