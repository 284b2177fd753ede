"""The root file system that a build sees."""

import os
import time

from build_service.frames import Trouble
from build_service.kernel import MS_BIND, MS_NODEV, MS_NOSUID, MS_RDONLY, MS_REMOUNT

DISK_TIMEOUT_S = 10.0
OWN_ROOT = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt")
"""What a build without an environment sees of this guest's own root, read-only."""


def find_disk(sys_root, serial):
    """The device of the disk with this serial."""
    # It may just have been plugged in, and there is no udev to wait for.
    deadline = time.monotonic() + DISK_TIMEOUT_S
    while True:
        for name in os.listdir(sys_root + "/block"):
            try:
                with open(f"{sys_root}/block/{name}/serial") as file:
                    found = file.read().strip() == serial
            except OSError:
                continue
            if found and os.path.exists("/dev/" + name):
                return "/dev/" + name
        if time.monotonic() > deadline:
            raise Trouble(f"no disk {serial} came within {DISK_TIMEOUT_S:g} s")
        time.sleep(0.02)


def make_root(kernel, place, disk):
    """The root that the build sees: `disk`, with what the build writes in `place`.  The path, and the mounts in their order."""
    lower, upper, work, root = [os.path.join(place, name) for name in ("lower", "upper", "work", "root")]
    for path in (lower, upper, work, root):
        os.mkdir(path, 0o755)
    kernel.mount(disk, lower, "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
    # volatile: nothing here outlives the build, so that no sync need reach the disk.
    options = f"lowerdir={lower},upperdir={upper},workdir={work},volatile"
    kernel.mount("overlay", root, "overlay", MS_NOSUID | MS_NODEV, options)
    return root, [lower, root]


def make_own_root(kernel, place):
    """The same for a build without an environment: this guest's own programs, and empty directories beside them."""
    root = os.path.join(place, "root")
    mounts = []
    for name in ("", "build", "tmp", "var", "var/tmp", "run", "proc", "dev", "root"):
        path = os.path.join(root, name)
        os.mkdir(path)
        os.chmod(path, 0o1777 if name in ("tmp", "var/tmp") else 0o755)
    for name in OWN_ROOT:
        path = os.path.join(root, name)
        if os.path.islink("/" + name):
            os.symlink(os.readlink("/" + name), path)
        elif os.path.isdir("/" + name):
            os.mkdir(path)
            kernel.mount("/" + name, path, None, MS_BIND)
            kernel.mount(None, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
            mounts.append(path)
    return root, mounts
