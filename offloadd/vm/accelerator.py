"""Which accelerator works here.

A /dev/kvm that exists and opens may still be useless (nested virtualization without hardware help: a guest loops for ever in
the host's emulation).  So KVM is *probed*: the image's own kernel must print its first console line within a few seconds.  The
verdict is kept for this boot of the host.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import trio

from offloadd.nursery import open_narrow_nursery
from offloadd.process import Progress, silent

PROBE_S = 8.0
"""Under working KVM the line comes within 0.2 s."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found, and why."""

    accelerator: str
    """`kvm` or `tcg`."""
    reason: str
    boot_id: str
    qemu: str


async def find_accelerator(
    qemu: Path, kernel: Path, cache: Path, progress: Progress = silent, *, device: Path = Path("/dev/kvm")
) -> Verdict:
    """The accelerator for guests of this host's architecture.

    Args:
        kernel: a Linux kernel to probe with.
        cache: the file in which the verdict is kept.
    """
    asked = _now(qemu)
    if reason := _unusable(device):
        # Not kept: a device may appear or change hands at any time, and looking costs nothing.
        return replace(asked, reason=reason)
    kept = _read(cache)
    if kept and (kept.boot_id, kept.qemu) == (asked.boot_id, asked.qemu):
        return kept
    progress("trying whether KVM works here", None)
    if await _boots(qemu, kernel):
        verdict = replace(asked, accelerator="kvm", reason="a kernel started under KVM")
    else:
        reason = f"{device} exists, but a kernel under KVM printed nothing within {PROBE_S:.0f} s"
        verdict = replace(asked, reason=reason)
    _write(cache, verdict)
    return verdict


def known_accelerator(qemu: Path, cache: Path, *, device: Path = Path("/dev/kvm")) -> str:
    """What `find_accelerator` would say as far as that is known without a probe; `tcg` as long as nothing was probed."""
    asked, kept = _now(qemu), _read(cache)
    if kept is None or _unusable(device) or (kept.boot_id, kept.qemu) != (asked.boot_id, asked.qemu):
        return asked.accelerator
    return kept.accelerator


def _now(qemu: Path) -> Verdict:
    """The verdict without KVM, for this boot of the host and this QEMU."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Verdict(accelerator="tcg", reason="", boot_id=boot_id, qemu=f"{qemu}:{qemu.stat().st_mtime_ns}")


def _unusable(device: Path) -> str:
    """Why a probe makes no sense; empty when it does."""
    if not device.exists():
        return f"there is no {device}"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user"
    return ""


def _read(cache: Path) -> Verdict | None:
    try:
        return Verdict(**json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write(cache: Path, verdict: Verdict) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Other daemons of this user read and write it too.
    new = cache.with_name(f"{cache.name}.{os.getpid()}")
    new.write_text(json.dumps(asdict(verdict)))
    new.replace(cache)


async def _boots(qemu: Path, kernel: Path) -> bool:
    argv = [str(qemu), "-accel", "kvm", "-machine", "pc", "-m", "256", "-no-user-config", "-nodefaults", "-no-reboot"]
    argv += ["-display", "none"]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    argv += ["-serial", "stdio", "-kernel", str(kernel), "-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1"]
    said = b""
    seen = False
    async with open_narrow_nursery() as nursery:
        process = await nursery.start(_run, argv)
        with trio.move_on_after(PROBE_S):
            async for chunk in process.stdout:
                # A serial port gives a few characters at a time.
                said += chunk
                if b"Linux version" in said or b"Kernel panic" in said:
                    seen = True
                    break
        process.kill()
    return seen


async def _run(argv: list[str], task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process(
        argv, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, task_status=task_status
    )
