"""What the kernel does for us where Python has no function for it (os.unshare is 3.12's)."""

import ctypes
import os

from build_service.frames import Trouble

# sched.h, sys/mount.h, linux/mount.h, sys/prctl.h, sys/personality.h, fcntl.h, signal.h
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PER_LINUX32, ADDR_NO_RANDOMIZE = 0x0008, 0x0040000
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SIGKILL = 9
SYS_MOUNT_SETATTR = 442
"""The same on every architecture, as all system calls since 424."""


class Kernel:
    def __init__(self):
        self._libc = ctypes.CDLL(None, use_errno=True)

    def call(self, what, name, *arguments):
        """Call a function of the C library that gives -1 when it fails."""
        if getattr(self._libc, name)(*arguments) == -1:
            raise Trouble(f"cannot {what}: {os.strerror(ctypes.get_errno())}")

    def mount(self, source, target, kind, flags, data=None):
        long_flags = ctypes.c_ulong(flags)
        names = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
        self.call(f"mount {kind or source} on {target}", "mount", *names[:3], long_flags, names[3])

    def bind(self, source, target):
        """Show `source`, with all that is mounted below it, at `target` too, read-only."""
        self.mount(source, target, None, MS_BIND | MS_REC)
        try:
            attributes = ctypes.c_uint64 * 4
            wanted = attributes(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
            numbers = [ctypes.c_long(number) for number in (SYS_MOUNT_SETATTR, AT_FDCWD)]
            size = ctypes.c_ulong(32)
            self.call(
                f"make {target} read-only",
                "syscall",
                *(*numbers, os.fsencode(target), ctypes.c_long(AT_RECURSIVE), ctypes.byref(wanted), size),
            )
        except Trouble:
            # Before Linux 5.12: what is mounted below stays as it is.
            self.mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)

    def unmount(self, target):
        self.call("unmount " + target, "umount2", os.fsencode(target), MNT_DETACH)

    def unshare(self, flags):
        self.call("make namespaces", "unshare", flags)

    def end_with_parent(self):
        self.call("follow the parent", "prctl", PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (SIGKILL, 0, 0, 0)))

    def set_personality(self, name):
        """What this process and those that it starts see of the machine: with "linux32", uname(2) names the 32-bit one.

        Addresses are not randomized, as in the builds of guix-daemon and nix-daemon: what a build makes ought not to depend on
        them.  Under TCG every process starts three times as fast: QEMU below 8.0 translates code anew for each address.
        """
        kind = PER_LINUX32 if name == "linux32" else 0
        # Where we are in a container its filter may let kinds through and nothing else.
        if self._libc.personality(ctypes.c_ulong(ADDR_NO_RANDOMIZE | kind)) == -1 and kind:
            self.call("set the personality", "personality", ctypes.c_ulong(kind))
