"""A compressed disk becomes a sparse file.  A program: `python -m offloadd.image.unpack SOURCE PACKING TARGET MAX-BYTES`.

PACKING is what the file's name says: gzip, bzip2, xz or zstd, and a tar with one file in it (Debian publishes its GNU/Hurd disk
so).  Who made it is not trusted: memory and output have limits, and a tar with anything else in it is refused.  It prints its
progress as lines `@FRACTION PHASE`; what else it prints is an error's text.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import resource
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

_PIECE = 1 << 20
_ZEROS = bytes(64 * 1024)
_MEMORY = 1 << 30
"""Bytes of address space: an archive's header can ask for any amount."""
_STEP = 0.01
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
_PROGRAMS = ("gz", "bz2", "xz", "zst")


class Refused(Exception):
    """The archive is damaged, or has something in it that is not taken."""


def packing(name: str) -> str:
    """What a file's name says that must be taken off: empty, `xz`, `tar`, `tar.xz`, ..."""
    # Of a URL, what stands after the path says nothing.
    path = re.split(r"[?#]", name)[0].lower() if "://" in name else name.lower()
    for short, long in _SHORT.items():
        path = path.removesuffix(short) + long if path.endswith(short) else path
    head, _, last = path.rpartition(".")
    packed = last if head and last in _PROGRAMS else ""
    is_tar = (head if packed else path).endswith(".tar")
    return ".".join(filter(None, ["tar" if is_tar else "", packed]))


def main(argv: list[str]) -> int:
    """Unpack the file `argv[1]`, packed as `argv[2]` says, to `argv[3]`, `argv[4]` bytes at most; the exit status."""
    source, packed, target, limit = Path(argv[1]), argv[2], Path(argv[3]), int(argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        with source.open("rb") as file, target.open("xb") as disk:
            _unpack(file, packed, disk, limit)
    except MemoryError:
        print("it needs more memory than an archive should")
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as exc:
        print(f"it is damaged: {exc}")
    except (Refused, OSError) as exc:
        print(exc)
    else:
        return 0
    return 1


def _unpack(file: BinaryIO, packed: str, disk: BinaryIO, limit: int) -> None:
    with _decompressed(file, packed.removeprefix("tar").removeprefix(".")) as stream:
        source = _only_member(stream) if packed.startswith("tar") else iter([stream])
        for content in source:
            _copy_sparsely(content, disk, limit, file)


@contextmanager
def _decompressed(file: BinaryIO, packing: str) -> Iterator[IO[bytes]]:
    match packing:
        case "gz":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=file))
        case "bz2":
            yield cast(IO[bytes], bz2.BZ2File(file))
        case "xz":
            yield cast(IO[bytes], lzma.LZMAFile(file))  # noqa: SIM115 - it is the caller's
        case "zst":
            with _zstd(file) as stream:
                yield stream
        case _:
            yield file


@contextmanager
def _zstd(file: BinaryIO) -> Iterator[IO[bytes]]:
    """Python has no zstd before 3.14."""
    try:
        program = subprocess.Popen(["zstd", "-d", "-c", "-q", "-M512MB"], stdin=file, stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise Refused("zstd is not installed: sudo apt-get install zstd") from None
    with program:
        assert program.stdout is not None
        yield program.stdout
        program.stdout.close()
        # It has said why.
        if program.wait():
            raise Refused("it is damaged")


def _only_member(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """The content of the one file of a tar; whoever takes it reads it to its end before the next look."""
    count = 0
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_PIECE) as tar:
        for member in tar:
            # tarfile keeps each of them.
            tar.members = []  # type: ignore[attr-defined]
            if member.isdir():
                continue
            if not member.isfile():
                raise Refused(f"{member.name!r:.200} in it is no file: one disk is expected")
            if count:
                raise Refused("it has several files: one disk is expected")
            count += 1
            content = tar.extractfile(member)
            assert content is not None
            yield content
    if not count:
        raise Refused("it has no file")


def _copy_sparsely(content: IO[bytes], disk: BinaryIO, limit: int, file: BinaryIO) -> None:
    """Write what is not zero; the progress is how far `file` has been read."""
    total, told, size = os.fstat(file.fileno()).st_size, 0.0, 0
    while piece := content.read(_PIECE):
        size += len(piece)
        if size > limit:
            raise Refused(f"it unpacks to more than {limit >> 30} GiB")
        view = memoryview(piece)
        for at in range(0, len(piece), len(_ZEROS)):
            block = view[at : at + len(_ZEROS)]
            if block == _ZEROS[: len(block)]:
                disk.seek(len(block), os.SEEK_CUR)
            else:
                disk.write(block)
        done = os.lseek(file.fileno(), 0, os.SEEK_CUR) / total
        if done >= told + _STEP:
            told = done
            print(f"@{min(done, 1.0):.3f} unpacking", flush=True)
    disk.truncate(size)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
