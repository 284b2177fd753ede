"""Disks that carry what is too much for frames: the source in, the outputs out.  And how a disk is found."""

import errno
import os
import time

from build_service.frames import Trouble
from build_service.kernel import MS_NODEV, MS_NOSUID, MS_RDONLY

TIMEOUT_S = 10.0


def find_disk(sys_root, serial):
    """The device of the disk with this serial, which nobody else uses.

    What was in a drive before may still be mounted, by a build that is just ending: the kernel would go on with what it knows
    of that one.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        why = f"no disk {serial} came"
        for name in os.listdir(sys_root + "/block"):
            if _serial(f"{sys_root}/block/{name}") == serial and os.path.exists("/dev/" + name):
                if _is_free("/dev/" + name):
                    return "/dev/" + name
                why = f"an earlier build did not let go of the disk {serial}"
        if time.monotonic() > deadline:
            raise Trouble(f"{why} within {TIMEOUT_S:g} s")
        time.sleep(0.02)


def _is_free(device):
    """Whether nothing of the device is mounted (open(2): O_EXCL without O_CREAT)."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return False
        raise
    return True


def _serial(folder):
    """As virtio shows it, or a SCSI disk: its page 80h (SPC, "Unit Serial Number") has four bytes before it."""
    for name, header in (("serial", 0), ("device/vpd_pg80", 4)):
        try:
            with open(f"{folder}/{name}", "rb") as file:
                return file.read()[header:].strip().decode(errors="replace")
        except OSError:
            continue
    return None


def mount_source(kernel, begin, root, place, sys_root, user):
    """Show the source's disk as the build's directory below `root`, writable, with what is written in `place`.

    The mounts in their order.
    """
    target = _make_directory(root, begin["directory"], user)
    # Names of our own choice, as in make_root.
    os.chdir(place)
    try:
        for name in ("source", "source-upper", "source-work"):
            os.mkdir(name, 0o755)
        kernel.mount(find_disk(sys_root, begin["source"]), "source", "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
        # The top of an overlay looks like the top of what is written.
        os.chown("source-upper", user, user)
        # As in any directory: those of the source can be renamed (redirect_dir), hard links stay links when they are written
        # to (index), all is one device (xino); and what gets a new mode or time alone is not copied (metacopy).
        options = "lowerdir=source,upperdir=source-upper,workdir=source-work"
        options += ",volatile,redirect_dir=on,index=on,xino=on,metacopy=on"
        kernel.mount("overlay", target, "overlay", MS_NOSUID | MS_NODEV, options)
        if begin["date"] is not None:
            # Otherwise this would be newer than everything that the build makes in it.
            os.utime(target, (begin["date"], begin["date"]))
        return [os.path.join(place, "source"), target]
    finally:
        os.chdir("/")


def _make_directory(root, directory, user):
    """Make `directory` below `root`, its missing parts the user's own; its path."""
    path = root
    for part in directory.split("/")[1:]:
        path = os.path.join(path, part)
        try:
            os.mkdir(path)
            os.chown(path, user, user)
        except FileExistsError:
            # We are not in the root yet: a link of the environment's would lead somewhere else.
            if os.path.islink(path):
                raise Trouble(f"{path} is a link") from None
    return path


def open_scratch(sys_root, serial):
    """A descriptor that writes to the disk with this serial, past the guest's memory: pieces are multiples of 4096 bytes."""
    return os.open(find_disk(sys_root, serial), os.O_WRONLY | os.O_DIRECT)
