"""From a plan to a QEMU process that is paused before its first instruction.

QEMU opens nothing of ours by path: each file and socket is opened here and handed over as a descriptor.  So it needs no right
in any folder, and when the daemon is root it runs as a user that owns nothing but this machine's disk and console log.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from offloadd.errors import HostError, ImageError
from offloadd.plan.argv import InstanceFiles, MemoryFds, QemuFds, qemu_argv
from offloadd.plan.machine import VmPlan
from offloadd.spare_user import find_spare_user
from offloadd.vm.memory import SavedGuest, Saving
from offloadd.vm.overlay import write_overlay
from offloadd.vm.process import QemuProcess, start_process

Memory = SavedGuest | Saving | None


@dataclass(frozen=True)
class QemuUser:
    """Whom QEMU runs as when the daemon is root."""

    uid: int
    groups: tuple[int, ...]


def launch(plan: VmPlan, files: InstanceFiles, memory: Memory = None) -> QemuProcess:
    """Make the disk of a volatile machine and start QEMU.  Blocks for some milliseconds.

    Args:
        memory: None: to boot; else what the guest goes on from, or where it will be saved.
    Raises:
        HostError: a program is missing, a file cannot be made; another machine writes to the disk.
        ImageError: the image was made anew since it was planned, and is not the one of `memory`.
    """
    try:
        write_overlay(files.disk, plan.boot.disk_size or plan.boot.disk.stat().st_size)
    except (OSError, ValueError) as exc:
        raise HostError(f"cannot make the disk: {exc}", subject=plan.instance) from exc
    user = _choose_user(plan, files)
    with _opened(plan, files, user, memory) as fds:
        argv = qemu_argv(plan, fds)
        return start_process(argv, files.qemu_log, fds.all(), user.uid if user else None, user.groups if user else ())


def _choose_user(plan: VmPlan, files: InstanceFiles) -> QemuUser | None:
    """A user that nobody else is, so that one that breaks out of its QEMU cannot touch other machines; None without root."""
    if os.geteuid():
        return None
    uid = find_spare_user(files.directory.parent.glob(f"*/{files.disk.name}"))
    groups = _kvm_groups() if plan.qemu.accelerator == "kvm" else ()
    # Where KVM is root's alone, or a container has no such users, QEMU runs as we do.
    return QemuUser(uid, groups) if groups is not None and uid is not None else None


def _kvm_groups() -> tuple[int, ...] | None:
    """The groups that QEMU needs to open /dev/kvm; None when no group would help."""
    device = Path("/dev/kvm").stat()
    if device.st_mode & 0o006 == 0o006:
        return ()
    return (device.st_gid,) if device.st_mode & 0o060 == 0o060 else None


@contextmanager
def _opened(plan: VmPlan, files: InstanceFiles, user: QemuUser | None, memory: Memory) -> Iterator[QemuFds]:
    """Everything that QEMU works with; our copies are closed when it has been started."""
    with ExitStack() as stack:

        def open_file(path: Path, flags: int) -> int:
            try:
                fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, fd)
                _permit(fd, flags, user)
            except OSError as exc:
                raise HostError(f"cannot hand {path} to QEMU: {exc.strerror}", subject=plan.instance) from exc
            return fd

        boot = plan.boot
        base = open_file(boot.disk, os.O_RDONLY) if plan.volatile else None
        given: MemoryFds | None = None
        if memory is not None:
            if base is not None and boot.disk_file is not None:
                _check_same(base, boot.disk_file, plan.instance)
            # Anybody may open a memory file; what may be done with it says its seal.
            given = MemoryFds(
                ram=open_file(_again(memory.ram), os.O_RDONLY),
                frozen=open_file(_again(memory.frozen), os.O_RDONLY) if isinstance(memory, SavedGuest) else None,
            )
        # Whose it is shows the user that this QEMU runs as, also where the guest writes to another one.
        overlay = open_file(files.disk, os.O_RDWR)
        yield QemuFds(
            memory=given,
            qmp=stack.enter_context(_listen(files.qmp, plan.instance)).fileno(),
            console=stack.enter_context(_listen(files.console, plan.instance)).fileno(),
            console_log=open_file(files.console_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            disk=overlay if plan.volatile else stack.enter_context(_open_own(plan)),
            base=base,
            agent=stack.enter_context(_listen(files.agent, plan.instance)).fileno() if boot.has_agent else None,
            kernel=open_file(boot.kernel, os.O_RDONLY) if boot.kernel else None,
            initramfs=open_file(boot.initramfs, os.O_RDONLY) if boot.initramfs else None,
        )


@contextmanager
def _open_own(plan: VmPlan) -> Iterator[int]:
    """The disk that the guest itself writes to, locked for as long as QEMU has it, whoever ends first."""
    path = plan.boot.disk
    hint = "one machine alone can write to a disk; --snapshot among its options would give each its own copy"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError(f"cannot write to its disk {path}: {exc.strerror}", subject=plan.instance) from exc
    try:
        try:
            # The lock is of what was opened, which QEMU gets: it ends with the last that has it.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise HostError(f"its disk {path} belongs to another machine that runs", subject=plan.instance, hint=hint) from exc
        yield fd
    finally:
        os.close(fd)


def _check_same(disk: int, planned: tuple[int, int], instance: str) -> None:
    about = os.fstat(disk)
    if (about.st_size, about.st_mtime_ns) != planned:
        raise ImageError("its image was made anew in the meantime", subject=instance, hint="try again")


def _again(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}")


def _permit(fd: int, flags: int, user: QemuUser | None) -> None:
    """/proc/self/fd opens a file anew, with the rights of who asks."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if flags & os.O_ACCMODE != os.O_RDONLY:
        os.fchmod(fd, 0o600)
        if user is not None:
            os.fchown(fd, user.uid, user.uid)
    elif user is not None and not mode & 0o004:
        os.fchmod(fd, mode | 0o444)


@contextmanager
def _listen(path: Path, instance: str) -> Iterator[socket.socket]:
    """A socket that listens already, so that nobody has to wait for QEMU to make it."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(path))
        except OSError as exc:
            hint = "a socket's path holds 107 bytes: set XDG_STATE_HOME to a shorter one"
            raise HostError(f"cannot make {path}: {exc}", subject=instance, hint=hint) from exc
        # The folder is for us alone, so nobody can be faster than this.
        path.chmod(0o600)
        listener.listen(1)
        yield listener
