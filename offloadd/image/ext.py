"""An ext2, ext3 or ext4 file system inside of a disk file, read and changed without mounting it: e2fsprogs does the work.

`DISK?offset=BYTES` is how its library is told where the file system begins (ext2fs_open2).  Nobody needs to be root for this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import trio

from offloadd.errors import ImageError
from offloadd.process import run_program

_STAT = re.compile(r"Type: (\w+(?: \w+)?)\s+Mode:\s+([0-7]+)")
_SIZE = re.compile(r"\bSize: (\d+)")
_OWNER = re.compile(r"^User:\s*(\d+)\s+Group:\s*(\d+)", re.MULTILINE)
_MAX_READ = 1 << 20
"""Bytes: the files that are read here are text."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a file."""

    kind: str
    """`regular`, `directory`, `symlink`, ..."""
    mode: int
    """Permission bits."""
    owner: tuple[int, int]
    """User and group."""
    size: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file (or, without content, a directory) as it shall be."""

    path: str
    """Absolute, of letters that need no quoting."""
    mode: int
    content: bytes | None = None
    owner: tuple[int, int] = (0, 0)


class FileSystem:
    """The file system at `start` (bytes) of the file `disk`.

    Args:
        room: an empty directory for files on their way.
        name: the image's.
    """

    def __init__(self, disk: Path, start: int, room: Path, name: str) -> None:
        self._disk = disk
        self._where = f"{disk.name}?offset={start}"
        self._room = room
        self._name = name

    async def repair(self) -> None:
        """Replay its journal, and mend what can be mended without asking.

        Raises:
            ImageError: it is damaged beyond that.
        """
        try:
            await self._run("e2fsck", "-f", "-p", self._where)
        except ImageError as exc:
            # e2fsck(8): 1 says that everything was corrected.
            if not exc.what.endswith("status 1"):
                raise ImageError("its file system is damaged", subject=self._name, detail=exc.detail) from exc

    async def check(self) -> None:
        """Raise ImageError unless it is without a fault; nothing is changed."""
        await self._run("e2fsck", "-f", "-n", self._where)

    async def about(self, path: str) -> About | None:
        """What `path` is, None when there is nothing; links on the way are followed, the last one is not."""
        text = "\n".join(await self._debugfs([f"stat {path}"]))
        found, size, owner = _STAT.search(text), _SIZE.search(text), _OWNER.search(text)
        if not found or not size or not owner:
            return None
        mode = int(found[2], 8) & 0o7777
        return About(kind=found[1], mode=mode, owner=(int(owner[1]), int(owner[2])), size=int(size[1]))

    async def read(self, path: str) -> bytes | None:
        """The content of a small regular file, None when there is none.

        Raises:
            ImageError: it is none, or large.
        """
        about = await self.about(path)
        if about is None:
            return None
        if about.kind != "regular" or about.size > _MAX_READ:
            raise ImageError(f"{path} in it is no small regular file", subject=self._name)
        copy = self._room / "read"
        await self._debugfs([f"dump {path} {copy.relative_to(self._disk.parent)}"])
        try:
            return await trio.to_thread.run_sync(copy.read_bytes)
        finally:
            copy.unlink(missing_ok=True)

    async def write(self, entries: list[Entry]) -> None:
        """Make every directory and file of `entries`, in that order; a file that is there is replaced.

        Raises:
            ImageError: one is not as it shall be afterwards, for instance because the file system is full.
        """
        commands: list[str] = []
        for number, entry in enumerate(entries):
            there = await self.about(entry.path)
            if entry.content is None:
                if there is None:
                    commands.append(f"mkdir {entry.path}")
            else:
                source = self._room / f"file-{number}"
                await trio.to_thread.run_sync(source.write_bytes, entry.content)
                folder, _, name = entry.path.rpartition("/")
                commands += [f"rm {entry.path}"] if there else []
                # `write` makes a name of the folder that one is in.
                commands += [f"cd {folder or '/'}", f"write {source.relative_to(self._disk.parent)} {name}", "cd /"]
            kind = 0o040000 if entry.content is None else 0o100000
            fields = {"mode": f"0{kind | entry.mode:o}", "uid": str(entry.owner[0]), "gid": str(entry.owner[1])}
            commands += [f"set_inode_field {entry.path} {field} {value}" for field, value in fields.items()]
        said = await self._debugfs(commands, write=True)
        await self._verify(entries, said)

    async def _verify(self, entries: list[Entry], said: list[str]) -> None:
        # debugfs goes on after a command that failed, and ends as if nothing were wrong.
        for entry in entries:
            about = await self.about(entry.path)
            kind = "directory" if entry.content is None else "regular"
            right = about is not None and (about.kind, about.mode, about.owner) == (kind, entry.mode, entry.owner)
            if not right or (entry.content is not None and await self.read(entry.path) != entry.content):
                detail = "\n".join(line for line in said if not line.startswith("debugfs"))
                raise ImageError(f"{entry.path} could not be put into it", subject=self._name, detail=detail)

    async def _debugfs(self, commands: list[str], *, write: bool = False) -> list[str]:
        script = self._room / "commands"
        await trio.to_thread.run_sync(script.write_text, "\n".join(commands) + "\n")
        lines: list[str] = []
        argv = ["debugfs", *(["-w"] if write else []), "-f", str(script.relative_to(self._disk.parent)), self._where]
        await run_program(
            argv, on_line=lines.append, cwd=self._disk.parent, subject=f"image {self._name}", error=ImageError, disk=self._disk
        )
        return lines

    async def _run(self, *argv: str) -> None:
        # From the disk's folder: a path may hold what the library takes for the beginning of its options.
        where = self._disk.parent
        await run_program(argv, cwd=where, subject=f"image {self._name}", error=ImageError, disk=where)
