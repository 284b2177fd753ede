"""What happened in a build, in order: one file of JSON lines, followed by any number of readers.

The file is the buffer: a reader that is slow costs no memory, and one that comes late misses nothing.

Events are objects with a field `event`:
    state    {"state": ..., "machine": ...}
    phase    {"text": ..., "fraction": 0..1 or null}      progress of what is being done
    step     {"index": 1, "count": 3, "command": ...}
    log      {"text": ...}                                what the build printed
    error    as `OffloadError.to_json`
    end      {"state": ..., "exit_status": ..., "result": {...}}    always the last
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

PIECE = 64 * 1024


class EventLog:
    """The events of one build."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._more = trio.lowlevel.ParkingLot()
        self._file = path.open("ab", buffering=0)
        _drop_torn(self._file.fileno(), path)
        self._unwritten = b""
        self.closed = False

    def append(self, event: str, **fields: Any) -> None:
        """Add one event; a build that has ended takes no more.

        Raises:
            OSError: the disk is full.  `error` and `end` are kept in memory then, so that those who follow hear of it.
        """
        if self.closed:
            return
        # File names are bytes, and may be in an error: what is no text must not end the daemon.
        line = json.dumps({"event": event, **fields}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        whole = self._file.tell()
        try:
            rest = line
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            # Nobody has read the torn line: we have not given up control since it was begun.
            self._file.truncate(whole)
            self._file.seek(whole)
            if event not in ("error", "end"):
                raise
            self._unwritten += line
        self._more.unpark_all()

    def close(self) -> None:
        self.closed = True
        self._file.close()
        self._more.unpark_all()

    async def follow(self) -> AsyncIterator[bytes]:
        """Pieces of the file from its beginning, until it is closed and read to its end."""
        with self._path.open("rb") as file:
            while True:
                if piece := file.read(PIECE):
                    yield piece
                elif self.closed:
                    if self._unwritten:
                        yield self._unwritten
                    return
                else:
                    await self._more.park()


def _drop_torn(fd: int, path: Path) -> None:
    """A host that lost its power may leave half a line, to which the next event would be joined."""
    end = os.fstat(fd).st_size
    with path.open("rb") as file:
        while end:
            begin = max(0, end - PIECE)
            file.seek(begin)
            if newline := file.read(end - begin).rfind(b"\n") + 1:
                end = begin + newline
                break
            end = begin
    os.ftruncate(fd, end)


async def read_events(path: Path) -> AsyncIterator[bytes]:
    """The events of a build that an earlier daemon ran."""
    try:
        file = path.open("rb")
    except FileNotFoundError:  # so old that its files were dropped
        return
    with file:
        while piece := file.read(PIECE):
            yield piece
            await trio.lowlevel.checkpoint()
