"""Our own initramfs: busybox, the kernel modules that the root disk needs, one script.

The archive is cpio's "newc" format as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst defines it.
Same input, same bytes: times are 0, owners root, inodes counted.
"""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_TRAILER = "TRAILER!!!"
_FOLDERS = ("bin", "dev", "modules", "proc", "root", "sys")


class InitramfsError(Exception):
    """The root file system lacks what the initramfs needs; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of the archive; `mode` includes the type's bits (stat.h)."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device file."""


def write_cpio(members: Iterable[Member]) -> bytes:
    """The members as a newc archive, in their order."""
    out = bytearray()
    for inode, member in enumerate([*members, Member(name=_TRAILER, mode=0)], start=1):
        name = member.name.encode() + b"\0"
        links = 0 if member.name == _TRAILER else 1
        number = 0 if member.name == _TRAILER else inode
        fields = (number, member.mode, 0, 0, links, 0, len(member.content), 0, 0, *member.device, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4) + member.content
        out += bytes(-len(out) % 4)
    return bytes(out)


def resolve_modules(wanted: Sequence[str], modules_dep: str, builtin: str = "") -> list[str]:
    """The paths (as in modules.dep) of the modules to load, each after what it depends on.

    Args:
        wanted: module names; `-` and `_` are the same.
        modules_dep: the text of modules.dep: `path: what it needs, the nearest first`.
        builtin: the text of modules.builtin; what stands there needs no loading.

    Raises:
        InitramfsError: with the names that this kernel does not have.
    """
    needs = {}
    for line in modules_dep.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    paths = {_module_name(path): path for path in needs}
    inside = {_module_name(path) for path in builtin.split()}
    names = [name.replace("-", "_") for name in wanted]
    missing = [name for name in names if name not in paths and name not in inside]
    if missing:
        raise InitramfsError(f"this kernel has no module {', '.join(missing)}")
    ordered: dict[str, None] = {}
    for name in names:
        if name in paths:
            ordered |= dict.fromkeys([*reversed(needs[paths[name]]), paths[name]])
    return list(ordered)


def _module_name(path: str) -> str:
    return PurePosixPath(path).name.split(".")[0].replace("-", "_")


def make_initramfs(root: Path, kernel_version: str, modules: Sequence[str], *, compress: bool = False) -> bytes:
    """The initramfs for the unpacked root file system `root`.

    Raises:
        InitramfsError: busybox, the init script or a module is missing.
    """
    folder = root / "usr/lib/modules" / kernel_version
    dep = _read(folder / "modules.dep").decode()
    builtin_file = folder / "modules.builtin"
    paths = resolve_modules(modules, dep, builtin_file.read_text() if builtin_file.exists() else "")
    contents = dict(_plain_module(folder / path) for path in paths)
    listing = "".join(f"/modules/{name}\n" for name in contents).encode()
    executable, plain = stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
    members = [Member(name=name, mode=stat.S_IFDIR | 0o755) for name in _FOLDERS]
    # The kernel opens /dev/console for the first process before anything can be mounted.
    members.append(Member(name="dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1)))
    members.append(Member(name="bin/busybox", mode=executable, content=_read(root / "usr/bin/busybox")))
    members.append(Member(name="init", mode=executable, content=_read(root / "usr/lib/offload/initramfs-init")))
    members.append(Member(name="modules.list", mode=plain, content=listing))
    members += [Member(name=f"modules/{name}", mode=plain, content=content) for name, content in contents.items()]
    archive = write_cpio(members)
    return gzip.compress(archive, 6, mtime=0) if compress else archive


_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress}


def _plain_module(file: Path) -> tuple[str, bytes]:
    """A module's name and content.  Decompressed here: under emulation the guest would take a second for it, at each boot."""
    content = _read(file)
    if file.suffix == ".ko":
        return file.name, content
    if file.suffix not in _DECOMPRESS:
        raise InitramfsError(f"the kernel's modules are compressed in a way that is not known here: {file.name}")
    try:
        return file.stem, _DECOMPRESS[file.suffix](content)
    except (OSError, EOFError, lzma.LZMAError) as exc:
        raise InitramfsError(f"cannot decompress {file}: {exc}") from exc


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as exc:
        raise InitramfsError(f"cannot read {file}: {exc.strerror}") from exc
