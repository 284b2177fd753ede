"""Run one build in this guest for the host that is at the other end of standard input and output.

    build-service [--state DIR] [--sys DIR]

A frame is a kind (1 byte), a length (4 bytes, big-endian) and a payload of at most 1 MiB.
    host -> guest   B begin (JSON)   S a piece of the source's tar   s its end
    guest -> host   E event (JSON)   L log   O a piece of the outputs' tar   o its end   D done, the last frame
The host keeps standard input open until it has the last frame: its end at any earlier moment cancels the build.

A cancelled build leaves nothing, whatever it was doing and whatever it did to prevent it, because of these processes:

    front    root; watches standard input; kills the worker, then removes the build's directory
      worker   root, process 1 of a PID namespace with a mount namespace of its own: when it is killed the kernel ends every
               process of the build and drops every mount
        porter   uid 1000, chroot: unpacks the source, packs the outputs; never sees a file that the build could not see
        bwrap    uid 1000: one step of the build

Exit status: 0 when the last frame was sent (also for a build that failed), 1 when the build was cancelled or the service broke.
"""

# Not `signal`: see build_service.steps.
import _signal
import os
import select
import sys
import time

from build_service.begin import check_begin
from build_service.directory import claim_directory, remove_tree
from build_service.frames import PIECE, Cancelled, Trouble, describe, parse_json, read_frame, send, send_event
from build_service.kernel import CLONE_NEWNS, CLONE_NEWPID, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC, Kernel
from build_service.outputs import send_outputs
from build_service.porter import Reported, as_porter
from build_service.root import find_disk, make_own_root, make_root
from build_service.source import unpack_source
from build_service.steps import cpu_model, run_steps

LINGER_S = 5.0


def work(kernel, begin, place, sys_root):
    """Do the build."""
    kernel.end_with_parent()
    kernel.unshare(CLONE_NEWNS)
    kernel.mount(None, "/", None, MS_REC | MS_PRIVATE)
    # bubblewrap looks for its child in /proc by the number that it has in our PID namespace.
    kernel.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if begin["environment"] is None:
        root, mounts = make_own_root(kernel, place)
    else:
        root, mounts = make_root(kernel, place, find_disk(sys_root, begin["environment"]))
    as_porter(root, begin, unpack_source, begin["date"])
    if begin["date"] is not None:
        try:
            # Linux has no clock that is younger than the boot: 1970-01-01T00:00:00 is a few seconds late.
            time.clock_settime(time.CLOCK_REALTIME, max(begin["date"], time.monotonic() + 0.01))
        except OSError as exc:
            raise Trouble(f"cannot set the clock: {exc.strerror}") from exc
    send_event("started", clock=time.time(), cpu=cpu_model(), kernel=os.uname().release)
    status, step = run_steps(begin, root)
    send_event("exit", status=status, step=step)
    if status == 0:
        as_porter(root, begin, send_outputs, begin["outputs"])
    elif begin["keep_failed"]:
        as_porter(root, begin, send_outputs, ["."])
    for path in reversed(mounts):
        kernel.unmount(path)


def start_worker(kernel, begin, place, sys_root):
    """Start the process that does the build; its exit status is 0 when the host was told everything."""
    kernel.unshare(CLONE_NEWPID)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        set_signals(_signal.SIG_DFL)
        work(kernel, begin, place, sys_root)
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


def run(kernel, begin, state, sys_root):
    """Run the build and leave nothing behind: True when the host was told everything."""
    alarm = open_alarm()
    place, lock = claim_directory(state, begin["build"])
    worker = status = None
    try:
        worker = start_worker(kernel, begin, place, sys_root)
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


def parse_options(arguments):
    options = {"--state": "/var/lib/offload/builds", "--sys": "/sys"}
    pairs = list(zip(arguments[::2], arguments[1::2], strict=False))
    if len(arguments) % 2 or any(name not in options for name, _ in pairs):
        sys.exit("usage: build-service [--state DIR] [--sys DIR]")
    options.update(pairs)
    return options["--state"], options["--sys"]


def main(arguments):
    state, sys_root = parse_options(arguments)
    os.umask(0o022)
    told = True
    try:
        try:
            kind, payload = read_frame()
            if kind != b"B":
                raise Trouble(f"the first frame is {kind!r}, not a begin frame")
            begin = check_begin(parse_json(payload.decode()))
            told = run(Kernel(), begin, state, sys_root)
        except (Trouble, OSError, ValueError) as exc:
            send_event("error", what=describe(exc))
        if told:
            send(b"D")
            linger()
    except (Cancelled, BrokenPipeError):
        told = False
    return 0 if told else 1
