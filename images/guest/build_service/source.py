"""Unpacking the source: a tar in the formats ustar and pax (POSIX.1-2001, pax)."""

import os

from build_service.frames import MAX_PAYLOAD, PIECE, Trouble, read_frame

BLOCK = 512


class SourceStream:
    """The payloads of the S frames, as one stream."""

    def __init__(self):
        self.piece = b""

    def some(self, size):
        """At least one byte, at most `size`."""
        while not self.piece:
            kind, self.piece = read_frame()
            if kind != b"S":
                raise Trouble("the source's tar is cut off")
        piece, self.piece = self.piece[:size], self.piece[size:]
        return piece

    def exactly(self, size):
        data = self.some(size)
        while len(data) < size:
            data += self.some(size - len(data))
        return data

    def copy(self, size, descriptor):
        left = size
        while left:
            piece = self.some(min(left, PIECE))
            left -= len(piece)
            while piece:
                piece = piece[os.write(descriptor, piece) :]
        if size % BLOCK:
            self.exactly(-size % BLOCK)

    def drain(self):
        """Read to the end of the source; what follows a tar's last block is padding."""
        kind = b"S"
        while kind == b"S":
            kind, _ = read_frame()
        if kind != b"s":
            raise Trouble(f"frame {kind!r} in the source")


def tar_number(field):
    """A number field: octal digits, or 256-based when the first bit is set (star and GNU tar)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def is_header(block):
    """Whether the block's checksum, which takes its own field as blanks, is right."""
    try:
        return sum(block[:148]) + sum(block[156:]) + 8 * 32 == tar_number(block[148:156])
    except ValueError:
        return False


def pax_records(data):
    """The records `LENGTH KEY=VALUE newline` of an extended header."""
    found = {}
    while data:
        length = int(data[: data.index(b" ")])
        key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
        if length < 5 or length > len(data):
            raise Trouble("the source's tar has a wrong extended header")
        found[key] = value
        data = data[length:]
    return found


def tar_members(stream):
    """(name, type, mode, mtime, link, size) of each member; the caller must read the contents before it goes on."""
    pax = {}
    while True:
        header = stream.exactly(BLOCK)
        if not header.strip(b"\0"):
            return
        if not is_header(header):
            raise Trouble("the source is not a tar")
        kind, size = header[156:157], tar_number(header[124:136])
        if kind in (b"x", b"g"):
            if size > MAX_PAYLOAD:
                raise Trouble(f"the source's tar has an extended header of {size} bytes")
            records = pax_records(stream.exactly(size + -size % BLOCK)[:size])
            pax = records if kind == b"x" else pax
            continue
        name = header[:100].rstrip(b"\0")
        prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
        name = pax.get(b"path", prefix + b"/" + name if prefix else name)
        mtime = int(pax[b"mtime"].partition(b".")[0]) if b"mtime" in pax else tar_number(header[136:148])
        size = int(pax.get(b"size", size)) if kind in (b"0", b"\0") else 0
        yield name, kind, tar_number(header[100:108]) & 0o777, mtime, pax.get(b"linkpath", header[157:257].rstrip(b"\0")), size
        pax = {}


def check_name(name):
    name = name.rstrip(b"/")
    if name.startswith(b"/") or b"\0" in name or any(part in (b"", b"..") for part in name.split(b"/")):
        raise Trouble(f"the source's tar has a member {name!r}")
    return name


def unpack_source(date):
    """Unpack the source into the current directory, which gets the time `date` (seconds since 1970, or None)."""
    stream = SourceStream()
    directories = []
    for name, kind, mode, mtime, link, size in tar_members(stream):
        name = check_name(name)
        if kind == b"5":
            if not os.path.isdir(name):
                os.mkdir(name)
            # Its own mode comes last: one that is not writable has still to be filled.
            os.chmod(name, mode | 0o700)
            directories.append((name, mode, mtime))
            continue
        if kind == b"2":
            os.symlink(link, name)
        elif kind == b"1":
            os.link(check_name(link), name, follow_symlinks=False)
        elif kind in (b"0", b"\0"):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            try:
                stream.copy(size, descriptor)
            finally:
                os.close(descriptor)
        else:
            raise Trouble(f"the source's tar has a member of type {kind!r}: {os.fsdecode(name)}")
        os.utime(name, (mtime, mtime), follow_symlinks=False)
    for name, mode, mtime in reversed(directories):
        os.chmod(name, mode)
        os.utime(name, (mtime, mtime))
    if date is not None:
        # Otherwise this would be newer than everything that the build makes in it.
        os.utime(".", (date, date))
    stream.drain()
