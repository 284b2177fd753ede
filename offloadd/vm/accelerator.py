"""Which accelerator works here.

A /dev/kvm that exists and opens may still be useless (nested virtualization without hardware help: a guest loops for ever in the host's
emulation).  So KVM is *probed*: the image's own kernel must print its first console line within a few seconds.  The verdict is kept for
this boot of the host.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

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


async def find_accelerator(qemu: Path, kernel: Path, cache: Path, *, device: Path = Path("/dev/kvm")) -> Verdict:
    """The accelerator for guests of this host's architecture.

    Args:
        kernel: a Linux kernel to probe with.
        cache: the file in which the verdict is kept.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    binary = f"{qemu}:{qemu.stat().st_mtime_ns}"
    kept = _read(cache)
    # A device that appears, vanishes or changes hands since is a new situation.
    usable = os.access(device, os.R_OK | os.W_OK)
    if kept and kept.boot_id == boot_id and kept.qemu == binary and (usable or kept.accelerator == "tcg"):
        return kept
    if not device.exists():
        accelerator, reason = "tcg", f"there is no {device}"
    elif not usable:
        return Verdict(accelerator="tcg", reason=f"{device} may not be opened by this user", boot_id=boot_id, qemu=binary)
    elif await _boots(qemu, kernel):
        accelerator, reason = "kvm", "a kernel started under KVM"
    else:
        accelerator, reason = "tcg", f"{device} exists, but a kernel under KVM printed nothing within {PROBE_S:.0f} s"
    verdict = Verdict(accelerator=accelerator, reason=reason, boot_id=boot_id, qemu=binary)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(asdict(verdict)))
    return verdict


def _read(cache: Path) -> Verdict | None:
    try:
        return Verdict(**json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        return None


async def _boots(qemu: Path, kernel: Path) -> bool:
    argv = [str(qemu), "-accel", "kvm", "-machine", "pc", "-m", "256", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    argv += ["-serial", "stdio", "-kernel", str(kernel), "-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1"]
    said = b""
    seen = False
    async with trio.open_nursery() as nursery:
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
