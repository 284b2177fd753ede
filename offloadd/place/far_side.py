"""What is run by the Python of a remote host, which has nothing of offload installed.

This file is sent there as it is, in front of what it works on: only the standard library, only what Python 3.9 has.  What it
prints is not trusted by whoever reads it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

STATE = "~/.cache/offload/builds"
"""Where builds are kept."""
BWRAP = "/usr/bin/bwrap"
PIECE = 64 * 1024
SPARE_USERS = (61184, 65519)
"""systemd's range for users that exist as long as a service runs (its doc/UIDS-GIDS): nobody's files have them."""


def state_directory() -> str:
    """Where this user's builds are kept."""
    return os.path.expanduser(STATE)


def make_state_directory() -> str:
    """The same, made when it is not there; for us alone."""
    path = state_directory()
    os.makedirs(path, 0o700, exist_ok=True)
    os.chmod(path, 0o700)
    return path


def spare_user() -> int:
    """A user that nobody else is here, for builds when we are root."""
    taken = set()
    for name in os.listdir("/proc"):
        try:
            taken.add(os.stat("/proc/" + name).st_uid)
        except OSError:
            continue  # it has just ended
    first, last = SPARE_USERS
    # Another service that chooses at the same time hardly comes to the same one.
    start = int.from_bytes(os.urandom(2), "big")
    users = [first + (start + number) % (last - first + 1) for number in range(last - first + 1)]
    return next(user for user in users if user not in taken)


def look(folder: str) -> dict[str, Any]:
    """What this host is and has, as JSON types; see `measure`."""
    import time

    kernel = os.uname()
    return {
        **measure(folder),
        "kernel": kernel.release,
        "machine": kernel.machine,
        "python": list(sys.version_info[:2]),
        "sandbox": _try_sandbox(),
        # Last: what comes before takes a moment.
        "time": time.time(),
    }


def measure(folder: str) -> dict[str, Any]:
    """What this host has to spare; the disk is that of `folder`, which need not exist yet."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "/"
    disk = os.statvfs(folder)
    return {
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": _memory_mib(),
        "disk_free": disk.f_bavail * disk.f_frsize,
    }


def _memory_mib() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) // 1024
    return 0


def _try_sandbox() -> str:
    """Why bubblewrap does not work here; empty when it does."""
    import subprocess

    argv = [BWRAP, "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "/bin/true"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    except FileNotFoundError:
        return "bubblewrap is not installed"
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"bubblewrap does not work: {exc}"
    if done.returncode == 0:
        return ""
    words = done.stderr.decode(errors="replace").strip().splitlines()
    return "bubblewrap does not work: " + (words[-1] if words else f"exit status {done.returncode}")


def exchange(size: int) -> None:
    """Take `size` bytes from standard input into a file where builds are kept, and give that file back."""
    path = os.path.join(make_state_directory(), f".exchange-{os.getpid()}-{os.urandom(4).hex()}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        left = size
        while left:
            piece = os.read(0, min(left, PIECE))
            if not piece:
                sys.exit(1)
            left -= len(piece)
            write_all(descriptor, piece)
        os.lseek(descriptor, 0, os.SEEK_SET)
        while piece := os.read(descriptor, PIECE):
            write_all(1, piece)
    finally:
        os.close(descriptor)
        os.unlink(path)


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def serve(size: int) -> int:
    """Run the build service, which comes as a zip of `size` bytes on standard input, in front of its frames."""
    archive = os.memfd_create("build-service")
    left = size
    while left:
        piece = os.read(0, min(left, PIECE))
        if not piece:
            return 1
        left -= len(piece)
        write_all(archive, piece)
    # zipimport takes any path of a regular file; this one is gone with its last process.
    sys.path.insert(0, f"/proc/self/fd/{archive}")
    # Nothing may be compiled into a directory; and nothing could be.
    sys.dont_write_bytecode = True
    from build_service.service import main  # type: ignore[import-not-found]

    options = ["--state", make_state_directory(), "--clock", "keep"]
    status: int = main(options if os.geteuid() else [*options, "--user", str(spare_user())])
    return status


def main(arguments: list[str]) -> int:
    """One of `look`, `exchange SIZE`, `serve SIZE`."""
    import json

    try:
        if arguments[0] == "look":
            write_all(1, json.dumps(look(state_directory())).encode())
        elif arguments[0] == "exchange":
            exchange(int(arguments[1]))
        else:
            return serve(int(arguments[1]))
    except OSError as exc:
        sys.exit(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
