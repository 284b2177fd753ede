"""Facts about a QEMU binary: its version and the CPU models that it knows."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import trio

from offloadd.errors import HostError

# One spelling of a line of `-cpu help`, all architectures: an optional first word, the model, an optional description.
_X86_LINE = re.compile(r"^x86\s+(\S+)")
_OTHER_LINE = re.compile(r"^(?:PowerPC |s390 |Available |\s+)?(\w[\w.+-]*)")


@dataclass(frozen=True, kw_only=True)
class QemuBinary:
    """One QEMU, looked at."""

    path: Path
    version: str
    cpu_models: frozenset[str]


_seen: dict[tuple[Path, int], QemuBinary] = {}


async def find_qemu(name: str) -> QemuBinary:
    """Look at the binary called `name` (a name in PATH or a path); remembered until the file changes.

    Raises:
        HostError: there is none, or it does not run.
    """
    found = shutil.which(name)
    if found is None:
        # Debian's packages provide the names of their programs; which package has which changes with its releases.
        install = f"apt-get install {name.replace('_', '-')}"
        hint = install if name.startswith("qemu-system-") else "`qemu` in the machine's file"
        raise HostError(f"{name} is not installed", hint=hint)
    path, _ = key = _identity(found)
    if key not in _seen:
        version = re.search(r"version (\S+)", await _ask(path, "--version"))
        models = parse_cpu_help(await _ask(path, "-cpu", "help"))
        _seen[key] = QemuBinary(path=path, version=version[1] if version else "unknown", cpu_models=models)
    return _seen[key]


def _identity(found: str) -> tuple[Path, int]:
    path = Path(found).resolve()
    return path, path.stat().st_mtime_ns


async def _ask(path: Path, *args: str) -> str:
    try:
        with trio.fail_after(30):
            done = await trio.run_process([path, *args], capture_stdout=True, capture_stderr=True)
    except (OSError, subprocess.CalledProcessError, trio.TooSlowError) as exc:
        raise HostError(f"{path} {' '.join(args)} does not work", detail=str(exc), hint="is this a QEMU binary?") from exc
    return done.stdout.decode(errors="replace")


def parse_cpu_help(text: str) -> frozenset[str]:
    """The models named by `qemu-system-* -cpu help`."""
    models: set[str] = set()
    for line in text.splitlines():
        if line.startswith("Recognized "):
            break
        match = _X86_LINE.match(line) or _OTHER_LINE.match(line)
        if match and not line.rstrip().endswith(":"):
            models.add(match[1])
    return frozenset(models)
