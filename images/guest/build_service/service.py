"""Run one build on this system, a guest or a host, for whoever is at the other end of standard input and output.

    build-service [--state DIR] [--user UID] [--clock keep|set] [--sys DIR]

--state  a directory for root alone, in which each build has one; several services may work in the same one
--user   who builds when we are root (1000): on a shared host a user that nobody else is.  Inside it is always 1000
--clock  what to do with a build's date: on a host it is `keep`, and a build that has one is refused

A frame is a kind (1 byte), a length (4 bytes, big-endian) and a payload of at most 1 MiB.
    host -> guest   B begin (JSON)   S a piece of the source's tar   s its end
    guest -> host   E event (JSON)   L log   O a piece of the outputs' tar   o its end   D done, the last frame
What is much comes and goes on disks, which the begin frame names by their serials (null: there is none).  `source` is a
squashfs of the source, in place of the frames S and s.  On `scratch`, from its first byte, goes an outputs' tar of more than
8 MiB, in place of the frames O: the event `scratch` says its size.
The host keeps standard input open until it has the last frame: its end at any earlier moment cancels the build.

A cancelled build leaves nothing, whatever it was doing and whatever it did to prevent it, because of these processes:

    front    root; watches standard input; kills the worker, then removes the build's directory
      worker   root, process 1 of a PID namespace with a mount namespace of its own: when it is killed the kernel ends every
               process of the build and drops every mount
        porter   the user, chroot: unpacks the source, packs the outputs; never sees a file that the build could not see
        bwrap    the user: one step of the build

Who is no root here becomes root of a user namespace that holds nobody else; then all of these are the same user.

Exit status: 0 when the last frame was sent (also for a build that failed), 1 when the build was cancelled or the service broke.
"""

# Not `signal`: see build_service.steps.
import _signal
import os
import select
import sys
import time

from build_service.begin import check_begin
from build_service.clock import set_clock
from build_service.directory import claim_directory, remove_tree
from build_service.disks import mount_source, open_scratch
from build_service.frames import PIECE, Cancelled, Trouble, describe, parse_json, read_frame, send, send_event
from build_service.kernel import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    Kernel,
)
from build_service.outputs import OutputStream, send_outputs
from build_service.porter import USER, Reported, as_porter
from build_service.root import ROOT, make_root
from build_service.source import unpack_source
from build_service.steps import cpu_model, run_steps

LINGER_S = 5.0


def work(kernel, begin, place, options, user):
    """Do the build."""
    kernel.end_with_parent()
    kernel.unshare(CLONE_NEWNS)
    kernel.mount(None, "/", None, MS_REC | MS_PRIVATE)
    # bubblewrap looks for its child in /proc by the number that it has in our PID namespace.
    kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mounts = make_root(kernel, begin, place, options["--sys"], user)
    if begin["source"] is None:
        as_porter(ROOT, begin, user, unpack_source, begin["date"])
    else:
        mounts += mount_source(kernel, begin, ROOT, place, options["--sys"], user)
    if begin["date"] is not None:
        try:
            set_clock(begin["date"])
        except OSError as exc:
            raise Trouble(f"cannot set the clock: {exc.strerror}") from exc
    send_event("started", clock=time.time(), cpu=cpu_model(), kernel=os.uname().release)
    status, step = run_steps(kernel, begin, user)
    send_event("exit", status=status, step=step, clock=time.time())
    wanted = begin["outputs"] if status == 0 else ["."]
    if status == 0 or begin["keep_failed"]:
        # Opened by root, and when nothing of the build runs any more.
        disk = open_scratch(options["--sys"], begin["scratch"]) if wanted and begin["scratch"] is not None else None
        as_porter(ROOT, begin, user, send_outputs, wanted, OutputStream(disk))
    for path in reversed(mounts):
        kernel.unmount(path)


def start_worker(kernel, begin, place, options, user):
    """Start the process that does the build; its exit status is 0 when the host was told everything."""
    kernel.unshare(CLONE_NEWPID)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        set_signals(_signal.SIG_DFL)
        work(kernel, begin, place, options, user)
        status = 0
    except Reported:
        status = 0
    except Cancelled:
        pass
    except Exception as exc:  # the last line of a process: whatever it is, the host is told
        send_event("error", what=describe(exc))
        status = 0
    finally:
        os._exit(status)


def set_signals(action):
    for number in (_signal.SIGHUP, _signal.SIGINT, _signal.SIGTERM):
        _signal.signal(number, action)


def open_alarm():
    """A descriptor that becomes readable when a signal comes that is to end us: noticed where we wait, nowhere in between."""
    alarm, alarm_end = os.pipe()
    os.set_blocking(alarm_end, False)
    _signal.set_wakeup_fd(alarm_end)
    set_signals(lambda number, frame: None)
    return alarm


def wait_for(worker, alarm):
    """Wait for the worker to end; Cancelled when the host goes away or a signal comes before."""
    ended = os.pidfd_open(worker)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(alarm, select.POLLIN)
    # Not POLLIN: the worker is the one who reads.  A closed pipe or socket shows itself beside that, read or not.
    poll.register(0, select.POLLRDHUP)
    if ended not in [descriptor for descriptor, _ in poll.poll()]:
        raise Cancelled


def run(kernel, begin, options, user):
    """Run the build and leave nothing behind: True when the host was told everything."""
    alarm = open_alarm()
    place, lock = claim_directory(options["--state"], begin["build"])
    worker = status = None
    try:
        worker = start_worker(kernel, begin, place, options, user)
        wait_for(worker, alarm)
    finally:
        if worker is not None:
            os.kill(worker, _signal.SIGKILL)
            status = os.waitpid(worker, 0)[1]
        remove_tree(place)
        os.close(lock)
    return status == 0


def linger():
    """Take what the host is still sending, until it closes.

    After an error the source may not have been read to its end.  A channel that is closed then would give the host an error
    about what it sends, in place of what we have to say.
    """
    deadline = time.monotonic() + LINGER_S
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while poll.poll(max(0, (deadline - time.monotonic()) * 1000)):
        if not os.read(0, PIECE):
            return


def become_root(kernel):
    """Be root of a user namespace in which there is nobody but us."""
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(CLONE_NEWUSER)
    # user_namespaces(7): without this, nobody who is no root may map a group.
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)


def parse_options(arguments):
    options = {"--state": "/var/lib/offload/builds", "--sys": "/sys", "--user": str(USER), "--clock": "set"}
    pairs = list(zip(arguments[::2], arguments[1::2]))  # noqa: B905 - a remote host may have Python 3.9
    options.update(pairs)
    right = options["--user"].isdecimal() and int(options["--user"]) and options["--clock"] in ("keep", "set")
    if len(arguments) % 2 or len(options) > 4 or not right:
        sys.exit("usage: build-service [--state DIR] [--user UID] [--clock keep|set] [--sys DIR]")
    return options


def serve(options):
    """Take a begin frame and run the build; True when the host was told everything."""
    kind, payload = read_frame()
    if kind != b"B":
        raise Trouble(f"the first frame is {kind!r}, not a begin frame")
    begin = check_begin(parse_json(payload.decode()))
    if begin["date"] is not None and options["--clock"] == "keep":
        raise Trouble("the clock of this host is not a build's to set")
    kernel, user = Kernel(), int(options["--user"])
    if os.geteuid():
        become_root(kernel)
        user = None
    return run(kernel, begin, options, user)


def main(arguments):
    options = parse_options(arguments)
    os.umask(0o022)
    told = True
    try:
        try:
            told = serve(options)
        except (Trouble, OSError, ValueError) as exc:
            send_event("error", what=describe(exc))
        if told:
            send(b"D")
            linger()
    except (Cancelled, BrokenPipeError):
        told = False
    return 0 if told else 1
