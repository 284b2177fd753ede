"""What the kernel does for us where Python has no function for it (os.unshare is 3.12's)."""

import os

from build_service.frames import Trouble

# sched.h, sys/mount.h, linux/mount.h, sys/prctl.h, sys/personality.h, fcntl.h, signal.h
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PER_LINUX32 = 0x0008
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SIGKILL = 9
SYS_MOUNT_SETATTR = 442
"""The same on every architecture, as all system calls since 424."""


class Kernel:
    def __init__(self):
        import ctypes

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)

    def call(self, what, name, *arguments):
        """Call a function of the C library that gives -1 when it fails."""
        if getattr(self._libc, name)(*arguments) == -1:
            raise Trouble(f"cannot {what}: {os.strerror(self._ctypes.get_errno())}")

    def mount(self, source, target, kind, flags, data=None):
        long_flags = self._ctypes.c_ulong(flags)
        names = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
        self.call(f"mount {kind or source} on {target}", "mount", *names[:3], long_flags, names[3])

    def bind(self, source, target):
        """Show `source`, with all that is mounted below it, at `target` too, read-only."""
        self.mount(source, target, None, MS_BIND | MS_REC)
        try:
            attributes = self._ctypes.c_uint64 * 4
            wanted = attributes(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
            numbers = [self._ctypes.c_long(number) for number in (SYS_MOUNT_SETATTR, AT_FDCWD)]
            size = self._ctypes.c_ulong(32)
            self.call(
                f"make {target} read-only",
                "syscall",
                *(*numbers, os.fsencode(target), self._ctypes.c_long(AT_RECURSIVE), self._ctypes.byref(wanted), size),
            )
        except Trouble:
            # Before Linux 5.12: what is mounted below stays as it is.
            self.mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)

    def unmount(self, target):
        self.call("unmount " + target, "umount2", os.fsencode(target), MNT_DETACH)

    def unshare(self, flags):
        self.call("make namespaces", "unshare", flags)

    def end_with_parent(self):
        self.call("follow the parent", "prctl", PR_SET_PDEATHSIG, *map(self._ctypes.c_ulong, (SIGKILL, 0, 0, 0)))

    def pretend_32_bit(self):
        """Have uname(2) name the 32-bit machine to this process and those that it starts."""
        self.call("set the personality", "personality", self._ctypes.c_ulong(PER_LINUX32))
