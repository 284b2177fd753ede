"""A build's directory, STATE/ID, locked as long as somebody works in it."""

import fcntl
import os

from build_service.frames import Trouble


def remove_tree(top):
    """Remove the directory `top`.  Directories are moved up before they are emptied: no depth is too deep, no name too long."""
    count, waiting, prefix = 0, [top], os.urandom(4).hex()
    while waiting:
        directory = waiting.pop()
        below = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                elif directory == top:
                    below.append(entry.path)
                else:
                    count += 1
                    below.append(f"{top}/.gone-{prefix}-{count}")
                    os.rename(entry.path, below[-1])
        if directory == top and below:
            waiting.append(top)
        else:
            os.rmdir(directory)
        waiting += below


def remove_stale(path):
    """Remove the directory of a build if nobody holds its lock."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        # Its owner was faster.
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_tree(path)
    except OSError:
        # In use; and what cannot be removed is no reason to refuse the next build.
        pass
    finally:
        os.close(lock)


def claim_directory(state, build):
    """Make STATE/ID and lock it; first remove what services that were killed have left.  The path and the lock's descriptor."""
    # Nobody else passes: a build can leave programs there that run as its user for whoever starts them.
    os.makedirs(state, 0o700, exist_ok=True)
    gate = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(gate, fcntl.LOCK_EX)
    try:
        for name in os.listdir(state):
            remove_stale(os.path.join(state, name))
        place = os.path.join(state, build)
        os.mkdir(place, 0o700)
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return place, lock
    except FileExistsError:
        raise Trouble(f"build {build} is running already") from None
    finally:
        os.close(gate)
