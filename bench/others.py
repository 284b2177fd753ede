"""Other ways to a fresh guest: plain QEMU, debvm-run, virtme-ng; with the accelerator, processors and memory of ours.

Sources: qemu-system-x86_64(1), debvm-run(1), vng(1).  None of them writes to the disk that it boots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.boots import FIRST
from bench.program import find_program, time_to_lines
from bench.systemd_image import READY, SystemdImage
from offloadd.plan.machine import BootFiles, VmPlan
from offloadd.process import program_environment

LIMIT_S = 120.0
COMMAND = "offload-bench: a command runs"
_ECHO = f"echo {COMMAND}"


def common_options(plan: VmPlan) -> list[str]:
    """What makes others comparable with `plan`; everything else is QEMU's default."""
    options = ["-accel", plan.qemu.accelerator, "-cpu", plan.cpu, "-smp", str(plan.cpu_count), "-m", f"{plan.memory_mib}M"]
    return [*options, "-snapshot", "-no-reboot"]


def plain_argv(plan: VmPlan, boot: BootFiles, append: str, *drives: Path) -> list[str]:
    """What a person would type to boot a disk, and further raw ones, with their kernel; the console is on standard output."""
    argv = [plan.qemu.binary, *common_options(plan), "-nographic", "-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)]
    for path in (boot.disk, *drives):
        argv += ["-drive", f"file={str(path).replace(',', ',,')},if=virtio,format=raw"]
    return [*argv, "-append", f"root=/dev/vda console=ttyS0 {append}".rstrip()]


async def boot_plain(plan: VmPlan) -> Sequence[float]:
    """Our disk, kernel and initramfs, to the first line of our init."""
    return await time_to_lines(plain_argv(plan, plan.boot, ""), [re.compile(FIRST)], limit_s=LIMIT_S)


async def boot_plain_command(plan: VmPlan, image: SystemdImage) -> Sequence[float]:
    """Debian's own initramfs and a shell instead of an init: the least that a boot can do before it runs a command."""
    argv = plain_argv(plan, image.boot, f'init=/bin/sh -- -c "{_ECHO}"')
    return await time_to_lines(argv, [_line(COMMAND)], limit_s=LIMIT_S)


async def boot_debvm(plan: VmPlan, image: SystemdImage) -> Sequence[float]:
    """To the end of multi-user.target."""
    program = find_program("debvm-run", "apt-get install debvm")
    argv = [program, "-i", str(image.boot.disk), "--", "-machine", f"accel={plan.qemu.accelerator}", *common_options(plan)[2:]]
    return await time_to_lines(argv, [_line(READY)], limit_s=LIMIT_S)


async def boot_vng(plan: VmPlan, image: SystemdImage, home: Path) -> Sequence[float]:
    """To the first command.  Its modules and tools come over 9p: virtiofs wants a daemon that not every Debian has."""
    program = find_program("vng", "pip install virtme-ng")
    find_program("modprobe", "apt-get install kmod, which vng needs")
    argv = [program, "--run", str(image.full_kernel()), "--root-disk", str(image.boot.disk), "--root-fstype", "ext4"]
    argv += ["--force-9p", "--busybox", str(image.full / "bin/busybox")]
    argv += [] if plan.qemu.accelerator == "kvm" else ["--disable-kvm"]
    argv += ["--cpus", str(plan.cpu_count), "--memory", f"{plan.memory_mib}M", "--exec", _ECHO]
    # It calls programs that are installed beside it, and keeps files in its user's home.
    path = f"{Path(program).parent}:{program_environment()['PATH']}"
    env = program_environment({"PATH": path, "HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)})
    return await time_to_lines(argv, [_line(COMMAND)], limit_s=LIMIT_S, env=env)


def _line(text: str) -> re.Pattern[str]:
    """A line of the guest's; the kernel shows its own command line too."""
    return re.compile(f"^{re.escape(text)}")
