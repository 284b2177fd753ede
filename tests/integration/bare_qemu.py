"""Real QEMUs without a system in them: their kernels are a few instructions of ours."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path

import trio

from offloadd.bridge import Bridge
from offloadd.plan.machine import BootFiles, QemuFacts, VmPlan
from offloadd.vm.instance import Instance, adopt_instance, open_instance, open_paused_instance
from offloadd.vm.launch import Memory

from ..conftest import has_open_below

# 16-bit code.  Say what is said on the serial port, then halt for ever / power off (PIIX4's PM1a control) / reset (keyboard).
HALT = b"\xfa\xf4\xeb\xfd"
POWER_OFF = b"\xba\x04\x06\xb8\x00\x20\xef" + HALT
RESET = b"\xb0\xfe\xe6\x64" + HALT


def say(text: bytes) -> bytes:
    return b"\xba\xf8\x03" + b"".join(b"\xb0%c\xee" % byte for byte in text)


def kernel(code: bytes) -> bytes:
    """The real-mode part of a Linux kernel (Linux: Documentation/arch/x86/boot.rst) with other code."""
    image = bytearray(8192)
    image[0x1F1] = 4  # sectors of set-up code
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = b"\xeb\x66"  # jump over the header
    image[0x202:0x206] = b"HdrS"
    image[0x206:0x208] = b"\x0c\x02"  # protocol 2.12
    image[0x211] = 1  # loaded high
    image[0x22C:0x230] = b"\xff\xff\xff\x37"  # where the initramfs may end
    image[0x268 : 0x268 + len(code)] = code
    return bytes(image)


class Bench:
    """Plans and directories for one test."""

    def __init__(self, root: Path, bridge: Bridge, facts: QemuFacts) -> None:
        self.root = root
        self.bridge = bridge
        self.instances = root / "instances"
        self.logs = root / "logs"
        self._facts = facts
        (root / "initramfs").write_bytes(bytes(512))
        with (root / "root.ext4").open("wb") as disk:
            disk.truncate(1 << 20)

    def plan(self, code: bytes = HALT, name: str = "m") -> VmPlan:
        path = self.root / f"{name}-vmlinuz"
        path.write_bytes(kernel(code))
        disk = self.root / "root.ext4"
        boot = BootFiles(
            image="i",
            digest="d",
            kernel=path,
            initramfs=self.root / "initramfs",
            disk=disk,
            disk_file=(disk.stat().st_size, disk.stat().st_mtime_ns) if disk.exists() else None,
        )
        return VmPlan(
            machine=name,
            instance=name,
            system="x86_64-linux",
            qemu=self._facts,
            boot=boot,
            cpu="qemu64",
            cpu_count=2,
            memory_mib=128,
            date=datetime(2020, 1, 1, tzinfo=UTC),
            forwards=((0, 22), (0, 80)),
            network=False,
            disk_slots=3,
            boot_timeout_s=60.0,
            options=(),
        )

    def open(
        self, plan: VmPlan, cores: tuple[int, ...] = (0, 0), memory: Memory = None
    ) -> AbstractAsyncContextManager[Instance]:
        folders = {"instances": self.instances, "logs": self.logs}
        return open_instance(plan, **folders, bridge=self.bridge, cores=cores, purpose="machine", memory=memory)

    def open_paused(self, plan: VmPlan, memory: Memory) -> AbstractAsyncContextManager[Instance]:
        folders = {"instances": self.instances, "logs": self.logs}
        return open_paused_instance(plan, **folders, bridge=self.bridge, cores=(0, 0), purpose="warm", memory=memory)

    def adopt(self, name: str = "m") -> AbstractAsyncContextManager[Instance | None]:
        return adopt_instance(self.instances / name, logs=self.logs, bridge=self.bridge)

    def qemus(self) -> list[int]:
        """Our QEMUs, zombies too."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
                command = (path.parent / "cmdline").read_bytes()
            except OSError:
                continue
            zombie = parent == os.getpid() and path.read_text().split()[1].startswith("(qemu-system")
            pid = int(path.parent.name)
            if zombie or (b"qemu-system" in command.split(b"\0")[0] and has_open_below(pid, self.root)):
                found.append(pid)
        return found

    def assert_nothing_left(self) -> None:
        assert self.qemus() == []
        assert not list(self.instances.glob("*"))


async def wait_for_console(instance: Instance, text: str) -> None:
    with trio.fail_after(60):
        while text not in instance.console_tail():
            await trio.sleep(0.05)


def descriptors(pid: int) -> list[str]:
    """What a process has open; sockets and pipes by their kind alone."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # the one that reads the folder
            found.append(str(link.readlink()).split(":[")[0])
    return found
