"""The root file system that a build sees."""

import os

from build_service.disks import find_disk
from build_service.frames import Trouble
from build_service.kernel import MS_BIND, MS_NODEV, MS_NOSUID, MS_RDONLY

OWN_ROOT = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt")
"""What a build without an environment sees of this system's own root, read-only."""

ROOT = "/tmp"
"""Where a build's root is mounted, in the worker's own mount namespace.

A place that any user can reach: bubblewrap runs as another one, and nobody else may reach the state directory.
"""
HOME = "build"
RESOLVER = "/etc/resolv.conf"


def make_root(kernel, begin, place, sys_root, user):
    """Mount at ROOT what the build sees, with what it writes in `place`; the mounts in their order."""
    # Names of our own choice from here on: what stands between `:` and `,` in overlay's options has to be quoted.
    environment = begin["environment"]
    os.chdir(place)
    try:
        if environment is None:
            mounts = _mount_own_root(kernel)
        else:
            mounts = [os.path.join(place, "lower"), ROOT]
            _mount_environment(kernel, environment, sys_root)
    finally:
        os.chdir("/")
    if user is not None:
        # On a shared host the user `build` is another one than in the environment's files.
        os.chown(os.path.join(ROOT, HOME), user, user, follow_symlinks=False)
    if begin["network"]:
        # The system's own root shows the name, which may be a link into its /run, which it does not show.
        _give_resolver(ROOT + (os.path.realpath(RESOLVER) if environment is None else RESOLVER))
    return mounts


def _mount_environment(kernel, environment, sys_root):
    for name in ("lower", "upper", "work"):
        os.mkdir(name, 0o755)
    if environment.startswith("/"):
        kernel.mount(environment, "lower", None, MS_BIND)
    else:
        kernel.mount(find_disk(sys_root, environment), "lower", "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
    # volatile: nothing here outlives the build, so that no sync need reach the disk.
    options = "lowerdir=lower,upperdir=upper,workdir=work,volatile"
    # Its notes are in attributes that are root's alone, or in a user's.
    options += ",userxattr" if is_mapped() else ""
    try:
        kernel.mount("overlay", ROOT, "overlay", MS_NOSUID | MS_NODEV, options)
    except Trouble as exc:
        why = "the state directory's file system may not hold one (another overlay, NFS)"
        if is_mapped():
            why += ", or the kernel is older than 5.11 and lets root alone do it"
        raise Trouble(f"{exc}: {why}") from None


def is_mapped():
    """Whether root is not root here, but somebody in a user namespace."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() != ["0", "0", "4294967295"]


def _mount_own_root(kernel):
    """The same for a build without an environment: this system's own programs, and empty directories beside them."""
    os.mkdir("root", 0o755)
    kernel.mount("root", ROOT, None, MS_BIND)
    mounts = [ROOT]
    for name in (HOME, "tmp", "var", "var/tmp", "run", "proc", "dev", "root"):
        path = os.path.join(ROOT, name)
        os.mkdir(path)
        os.chmod(path, 0o1777 if name in ("tmp", "var/tmp") else 0o755)
    for name in OWN_ROOT:
        path = os.path.join(ROOT, name)
        if os.path.islink("/" + name):
            os.symlink(os.readlink("/" + name), path)
        elif os.path.isdir("/" + name):
            os.mkdir(path)
            kernel.bind("/" + name, path)
            mounts.append(path)
    return mounts


def _give_resolver(target):
    """Have the build find names as this system does: its resolver's settings are copied to `target`, unless they show there."""
    if not os.path.exists(RESOLVER) or (os.path.exists(target) and os.path.samefile(RESOLVER, target)):
        return
    with open(RESOLVER, "rb") as file:
        text = file.read()
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.lexists(target):
        os.unlink(target)
    with open(target, "xb") as file:
        file.write(text)
