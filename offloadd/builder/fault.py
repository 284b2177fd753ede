"""Whether a build that failed under qemu-user looks as if the emulator failed, not the build.  A pure function.

A program that kills itself looks the same; another try in a machine with a kernel of its own then tells.  Abort (signal 6) is
not in here: that is what a failed assertion ends with, emulated or not.

Sources of the texts: QEMU's linux-user/ (signal.c, syscall.c, elfload.c) and accel/tcg/ in releases 4 to 10, and reports of
builds that died of them; dash, bash, make and others for what they say of a process that a signal ended.
"""

from __future__ import annotations

import re
import signal

_SIGNALS = (signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGSEGV)
"""What a wrongly translated program dies of."""
_DEAD = "(?:Illegal instruction|Trace/breakpoint trap|Bus error|Segmentation fault)"
"""strsignal(3) of these."""
_NAMES = "(?:SIGILL|SIGTRAP|SIGBUS|SIGSEGV)"
_LIMIT = 200
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;:]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_QEMU = re.compile(
    "|".join(
        (
            # linux-user/signal.c.  SIGBUS is 10 on MIPS.
            r"qemu: uncaught target signal (?:4|5|7|10|11) ",
            # linux-user/signal.c since 7.1: the emulator's own code died; before the colon stands its file's name.
            r"QEMU internal SIG\w+ \{",
            # EXCP_DUMP: linux-user/*/cpu_loop.c, and cpu_abort().
            r"qemu: unhandled CPU exception 0x",
            r"qemu: fatal: ",
            r"tcg fatal error",
            # Until release 4 by itself, later on request (QEMU_LOG=unimp); syscall.c.
            r"(?:qemu: )?Unsupported syscall: -?\d+",
            r"Unsupported (?:ioctl: cmd=0x|[gs]etsockopt level=|ancillary data: )[0-9a-f]+",
            # elfload.c: no place for the program in the emulator's own memory.
            r"Unable to (?:find a guest_base to satisfy|reserve 0x[0-9a-f]+ bytes of virtual address space)",
            r"Allocating guest commpage: ",
            # Its own assertions, as glib and as the C library write them.
            r"ERROR:\S*\b(?:accel/tcg|linux-user|plugins|tcg|target/\w+)/\S+\.c\S*:\d+:\w+: (?:assertion|code should not)",
            r"^(?:qemu-[\w-]+|\S+-binfmt-P): \S+:\d+: .*Assertion `.*' failed",
        )
    )
)

_DEATH = re.compile(
    "|".join(
        (
            # dash and bash, which names the script and the process; (core dumped) when there is one.
            rf"^(?:\S.*: line \d+: +\d+ )?{_DEAD}(?: \(core dumped\))?(?: +\S.*)?$",
            # make: "*** [Makefile:3: all] Segmentation fault", or the status that a shell in between made of it.
            rf"\*\*\* \[.*\] (?:{_DEAD}|Error (?:132|133|135|139)\b)",
            # gcc's driver, of its own compiler.
            rf"internal compiler error: {_DEAD}",
            # dpkg, tox and many more.
            r"(?:exit status|exit code|exited with(?: code)?|returned error exit status|return code)[ :]+(?:132|133|135|139)\b",
            # Meson, cargo, CTest, Python's subprocess, Go.
            rf"killed by signal (?:4|5|7|11) {_NAMES}",
            rf"\(signal: (?:4|5|7|11), {_NAMES}: .*\)",
            r"\*\*\*Exception: (?:SegFault|Illegal|Bus error)",
            rf"died with <Signals\.{_NAMES}: \d+>",
            r"^SIG(?:SEGV: segmentation violation|ILL: illegal instruction|BUS: bus error)",
        )
    )
)


def find_emulator_fault(log_tail: str, exit_status: int) -> str:
    """Why the failure of a build under qemu-user looks like the emulator's.

    Args:
        log_tail: the end of the build's log; nothing in it is trusted.
        exit_status: of the step that failed; negative, or above 128, when a signal ended it.

    Returns:
        One line for people: what the emulator or the shell said.  Empty when it looks like the build's own doing.
    """
    if exit_status == 0:
        return ""
    lines = [_UNPRINTABLE.sub("", line).strip() for line in log_tail.splitlines()]
    said = _last_match(_QEMU, lines) or _last_match(_DEATH, lines)
    return said[:_LIMIT] if said else _death(exit_status)


def _last_match(pattern: re.Pattern[str], lines: list[str]) -> str:
    """The last line that `pattern` is found in: what is nearest to the end of the build."""
    return next((line for line in reversed(lines) if pattern.search(line)), "")


def _death(exit_status: int) -> str:
    number = -exit_status if exit_status < 0 else exit_status - 128
    if number in _SIGNALS:
        return f"ended by {signal.Signals(number).name} (exit status {exit_status})"
    return ""
