"""A shell in an environment, with a root that is thrown away afterwards: what a build finds, for a person.

    shell --environment DIR --state DIR --user UID [--root yes] [--network yes] [--personality linux32] [-- COMMAND...]

Standard input, output and error are the command's own.  The front and the worker are as in build_service.service.
Exit status: the command's, 128+N when signal N ended it; 125 when it could not be started.
"""

# Not `signal`: see build_service.steps.
import _signal
import os
import select
import sys

from build_service.directory import claim_directory, remove_tree
from build_service.frames import Cancelled, Trouble, describe
from build_service.kernel import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    Kernel,
)
from build_service.porter import GROUP, USER, become_user
from build_service.root import ROOT, make_root
from build_service.steps import BWRAP, PATH

NOT_STARTED = 125
# What a package manager needs (capabilities(7)), and nothing that reaches out of the root.
ROOT_CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"),
    *("CAP_SETFCAP", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_CHROOT"),
)
OPTIONS = ("--environment", "--state", "--user", "--root", "--network", "--personality", "--term")


def identity_arguments(options):
    """Who the command is, and in which namespaces."""
    if "--root" not in options:
        return ["--unshare-all", "--uid", str(USER), "--gid", str(GROUP), "--cap-drop", "ALL"]
    # No user namespace: files of several users are to be made.
    spaces = ("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-net", "--unshare-cgroup-try")
    return [*spaces, "--cap-drop", "ALL", *(word for name in ROOT_CAPABILITIES for word in ("--cap-add", name))]


def sandbox_arguments(options, command):
    home, name = ("/root", "root") if "--root" in options else ("/build", "build")
    variables = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": home, "USER": name, "LOGNAME": name}
    variables["TERM"] = options.get("--term", "dumb")
    sharing = identity_arguments(options)
    if "--network" in options:
        sharing = [word for word in sharing if word != "--unshare-net"]
        sharing += [] if "--root" in options else ["--share-net"]
    return [
        *(BWRAP, *sharing, "--die-with-parent", "--hostname", "localhost"),
        *("--bind", ROOT, "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/dev/shm"),
        *("--chdir", home, "--clearenv"),
        *(word for variable, value in variables.items() for word in ("--setenv", variable, value)),
        *("--", *command),
    ]


def start_command(kernel, options, command):
    child = os.fork()
    if child:
        return child
    try:
        for number in (_signal.SIGINT, _signal.SIGQUIT, _signal.SIGPIPE, _signal.SIGXFSZ):
            _signal.signal(number, _signal.SIG_DFL)
        kernel.set_personality(options.get("--personality"))
        if "--root" not in options:
            become_user(int(options["--user"]))
        os.chdir("/")
        os.execve(BWRAP, sandbox_arguments(options, command), {})  # noqa: S606
    except (OSError, Trouble) as exc:
        complain(exc)
    finally:
        os._exit(NOT_STARTED)


def work(kernel, options, command, place):
    """What process 1 of the namespaces does; the command's exit status."""
    kernel.end_with_parent()
    kernel.unshare(CLONE_NEWNS)
    kernel.mount(None, "/", None, MS_REC | MS_PRIVATE)
    kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    asked = {"environment": options["--environment"], "network": "--network" in options}
    make_root(kernel, asked, place, "/sys", int(options["--user"]))
    child = start_command(kernel, options, command)
    while True:
        # As process 1 we inherit what the command leaves behind.
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            return os.waitstatus_to_exitcode(status)


def start_worker(kernel, options, command, place):
    kernel.unshare(CLONE_NEWPID)
    child = os.fork()
    if child:
        return child
    status = NOT_STARTED
    try:
        _signal.set_wakeup_fd(-1)
        status = work(kernel, options, command, place)
    except Exception as exc:  # the last line of a process
        complain(exc)
    finally:
        os._exit(status if status >= 0 else 128 - status)


def complain(exc):
    os.write(2, b"offload: " + describe(exc).encode() + b"\n")


def open_alarm():
    """A descriptor that becomes readable when a signal comes that is to end us; the keyboard's are the command's alone."""
    alarm, alarm_end = os.pipe()
    os.set_blocking(alarm_end, False)
    _signal.set_wakeup_fd(alarm_end)
    for number in (_signal.SIGHUP, _signal.SIGTERM):
        _signal.signal(number, lambda number, frame: None)
    for number in (_signal.SIGINT, _signal.SIGQUIT):
        _signal.signal(number, _signal.SIG_IGN)
    return alarm


def wait_for(worker, alarm):
    ended = os.pidfd_open(worker)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(alarm, select.POLLIN)
    if ended not in [descriptor for descriptor, _ in poll.poll()]:
        raise Cancelled


def run(options, command):
    alarm = open_alarm()
    kernel = Kernel()
    place, lock = claim_directory(options["--state"], f"shell-{os.getpid()}")
    worker, status = None, NOT_STARTED
    try:
        worker = start_worker(kernel, options, command, place)
        wait_for(worker, alarm)
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        worker = None
    except Cancelled:
        status = 128 + _signal.SIGTERM
    finally:
        if worker is not None:
            os.kill(worker, _signal.SIGKILL)
            os.waitpid(worker, 0)
        remove_tree(place)
        os.close(lock)
    return status if status >= 0 else 128 - status


def main(arguments):
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = dict(zip(arguments[:at:2], arguments[1:at:2], strict=True))
    if any(name not in OPTIONS for name in options):
        sys.exit("usage: " + __doc__.split("\n")[2].strip())
    os.umask(0o022)
    try:
        return run(options, arguments[at + 1 :] or ["/bin/sh", "-c", "exec bash || exec sh"])
    except (Trouble, OSError) as exc:
        complain(exc)
        return NOT_STARTED
