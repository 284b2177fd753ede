"""Processes that carry files into and out of the build's root as the user whom builds run as."""

import os
import sys

from build_service.frames import Cancelled, describe, send_event

USER = GROUP = 1000
"""Who a build is, as it sees itself.  On a shared host another user stands behind it: there, 1000 is somebody."""


class Reported(Exception):
    """A porter failed and has told the host why."""


def become_user(user):
    """Be `user` for good; None: we are no root, and stay who we are."""
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


def enter(root, directory, user):
    """Go into `root` for good, make `directory` there, the user's own, and become that user."""
    os.chroot(root)
    os.chdir("/")
    # From here on /usr/lib/python3 is the environment's: nothing may be imported from there.
    sys.path.clear()
    for part in directory.split("/")[1:]:
        try:
            os.mkdir(part)
            if user is not None:
                os.chown(part, user, user)
        except FileExistsError:
            pass
        os.chdir(part)
    os.umask(0)
    become_user(user)


def as_porter(root, begin, user, work, *arguments):
    """Call `work(*arguments)` as `user` inside `root`, in a process of its own.

    Reported: it failed.  Cancelled: the host went away.
    """
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise Reported if code == 1 else Cancelled
        return
    status = 2
    try:
        enter(root, begin["directory"], user)
        work(*arguments)
        status = 0
    except Cancelled:
        pass
    except Exception as exc:  # the last line of a process: whatever it is, the host is told
        send_event("error", what=describe(exc))
        status = 1
    finally:
        # Never back into the worker's own code.
        os._exit(status)
