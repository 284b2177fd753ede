"""The steps, each in a sandbox of its own."""

# Under emulation the module `signal` costs 0.15 s of every build (enum): this is the C module below it.
import _signal
import os
import select

from build_service.frames import PIECE, Trouble, send, send_event
from build_service.porter import GROUP, USER, become_user
from build_service.root import ROOT

BWRAP = "/usr/bin/bwrap"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


WRITABLE = ("build", "tmp", "var/tmp")


def root_arguments(user):
    """How bubblewrap shows the root."""
    if user is not None:
        return ["--bind", ROOT, "/"]
    # All files are our own here, yet a build is to find the same rights everywhere.
    return ["--ro-bind", ROOT, "/", *(word for name in WRITABLE for word in ("--bind", f"{ROOT}/{name}", f"/{name}"))]


def sandbox_arguments(begin, user, command, status_descriptor):
    """The command line of bubblewrap for one step."""
    environment = {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOME": "/build",
        "USER": "build",
        "LOGNAME": "build",
        "TERM": "dumb",
        "OFFLOAD_BUILD": begin["build"],
        **begin["env"],
    }
    return [
        *(BWRAP, "--unshare-all", "--die-with-parent", "--new-session", "--json-status-fd", str(status_descriptor)),
        *(["--share-net"] if begin["network"] else []),
        # Where we are no root but in a user namespace we have capabilities, which are not the build's.
        *("--uid", str(USER), "--gid", str(GROUP), "--cap-drop", "ALL"),
        # The one name that every environment's /etc/hosts knows.
        *("--hostname", "localhost"),
        *(*root_arguments(user), "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/dev/shm"),
        *("--chdir", begin["directory"], "--clearenv"),
        *(word for name, value in environment.items() for word in ("--setenv", name, value)),
        *("--", "/bin/sh", "-e", "-c", command),
    ]


def start_step(kernel, begin, user, command, log, status):
    """Start bubblewrap with the descriptor `log` as its output; the process."""
    child = os.fork()
    if child:
        return child
    try:
        # Should memory run out, the build goes and not the guest's own services.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("800")
        nothing = os.open("/dev/null", os.O_RDONLY)
        for number, descriptor in enumerate((nothing, log, log)):
            os.dup2(descriptor, number)
        os.set_inheritable(status, True)
        # Python ignores these two; `yes | head` relies on them.
        _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
        _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
        kernel.set_personality(begin["personality"])
        become_user(user)
        os.chdir("/")
        os.execve(BWRAP, sandbox_arguments(begin, user, command, status), {})  # noqa: S606
    except (OSError, Trouble) as exc:
        os.write(2, os.fsencode(f"{BWRAP}: {exc}\n"))
    finally:
        os._exit(127)


def end_processes():
    """Kill and reap everything that a step has left running."""
    if os.getpid() != 1:
        # kill(-1) is only for a namespace that is the build's alone.
        raise Trouble("the worker is not the first process of its namespace")
    try:  # noqa: SIM105  contextlib is slow to import
        os.kill(-1, _signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def copy_log(log, child):
    """Send what comes out of `log` as it comes, until the process `child` ends: the log may close earlier, or not even then."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(log, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if ended in ready:
            # What is still in the pipe is read when all are dead: something in the background could go on writing for ever.
            os.close(ended)
            return
        if piece := os.read(log, PIECE):
            send(b"L", piece)
        else:
            poll.unregister(log)


def run_step(kernel, begin, user, command):
    """The exit status of one step; afterwards none of its processes is left."""
    log, log_end = os.pipe()
    status, status_end = os.pipe()
    child = start_step(kernel, begin, user, command, log_end, status_end)
    os.close(log_end)
    os.close(status_end)
    copy_log(log, child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end_processes()
    while piece := os.read(log, PIECE):
        send(b"L", piece)
    # bubblewrap says in two lines how it went; without the second it was bubblewrap that failed, not the step.
    started = b'"exit-code"' in os.read(status, 4096) + os.read(status, 4096)
    os.close(log)
    os.close(status)
    if code >= 0 and not started:
        raise Trouble("the sandbox for the step could not be made: the log's last lines say why")
    return code if code >= 0 else 128 - code


def run_steps(kernel, begin, user):
    """Run the steps up to the first that fails: (its exit status or 0, number of the last step that ran)."""
    count = len(begin["steps"])
    for index, command in enumerate(begin["steps"], 1):
        send_event("step", index=index, count=count, command=command)
        status = run_step(kernel, begin, user, command)
        if status:
            return status, index
    return 0, count


# What names the model, on x86, MIPS, POWER, 64-bit ARM (ARM's number of the part), RISC-V, IBM Z.
CPU_FIELDS = ("model name", "Model", "cpu model", "cpu", "CPU part", "isa", "processor 0")


def cpu_model():
    with open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in CPU_FIELDS:
                return value.strip()
    return ""
