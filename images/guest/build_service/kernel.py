"""What the kernel does for us where Python has no function for it (os.unshare is 3.12's)."""

import os

from build_service.frames import Trouble

# sched.h, sys/mount.h, sys/prctl.h, signal.h
CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SIGKILL = 9


class Kernel:
    def __init__(self):
        import ctypes

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)

    def call(self, what, name, *arguments):
        if getattr(self._libc, name)(*arguments):
            raise Trouble(f"cannot {what}: {os.strerror(self._ctypes.get_errno())}")

    def mount(self, source, target, kind, flags, data=None):
        long_flags = self._ctypes.c_ulong(flags)
        names = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
        self.call(f"mount {kind or source} on {target}", "mount", *names[:3], long_flags, names[3])

    def unmount(self, target):
        self.call("unmount " + target, "umount2", os.fsencode(target), MNT_DETACH)

    def unshare(self, flags):
        self.call("make namespaces", "unshare", flags)

    def end_with_parent(self):
        self.call("follow the parent", "prctl", PR_SET_PDEATHSIG, *map(self._ctypes.c_ulong, (SIGKILL, 0, 0, 0)))
