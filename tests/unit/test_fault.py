"""What looks like a failure of qemu-user, and what is a build's own.  The lines are from real logs."""

from __future__ import annotations

import pytest

from offloadd.builder.fault import find_emulator_fault

FAULTS = [
    "qemu: uncaught target signal 11 (Segmentation fault) - core dumped",
    "qemu: uncaught target signal 4 (Illegal instruction) - core dumped",
    "qemu: uncaught target signal 7 (Bus error) - core dumped",
    "#51 796.8 aarch64-binfmt-P: QEMU internal SIGSEGV {code=MAPERR, addr=0x20}",
    "qemu-x86_64: QEMU internal SIGSEGV {code=MAPERR, addr=0x20}",
    "qemu_launcher: QEMU internal SIGSEGV {code=128, addr=(nil)}",
    "qemu: unhandled CPU exception 0x8 - aborting",
    "qemu: Unsupported syscall: 278",
    "Unsupported syscall: 435",
    "/build/qemu-Ee59aw/qemu-2.0.0+dfsg/tcg/optimize.c:362: tcg fatal error",
    "ERROR:../accel/tcg/cpu-exec.c:532:cpu_exec_longjmp_cleanup: assertion failed: (cpu == current_cpu)",
    "Bail out! ERROR:../accel/tcg/cpu-exec.c:532:cpu_exec_longjmp_cleanup: assertion failed: (cpu == current_cpu)",
    "ERROR:../qemu-8.0.3/accel/tcg/cpu-exec.c:1028:cpu_exec_setjmp: assertion failed: (cpu == current_cpu)",
    "ERROR:../plugins/core.c:221:qemu_plugin_vcpu_init_hook: assertion failed: (success)",
    "qemu-m68k-static: /local_scratch/glaubitz/qemu-m68k/translate-all.c:179: tb_lock: Assertion `!have_tb_lock' failed.",
    "qemu-arm-static: Unable to reserve 0xfffff000 bytes of virtual address space at 0x1000 (Success) for use as guest",
    "Segmentation fault",
    "Segmentation fault (core dumped)",
    "Illegal instruction",
    "./check.sh: line 3:  1234 Segmentation fault      (core dumped) ./prog --test",
    "make: *** [Makefile:3: all] Segmentation fault (core dumped)",
    "make[2]: *** [Makefile:71: test] Error 139",
    "make[1]: *** [debian/rules:12: override_dh_auto_test] Illegal instruction",
    "gcc: internal compiler error: Segmentation fault signal terminated program cc1",
    " installed libc-bin package post-installation script subprocess returned error exit status 139",
    " 3/17 hash          FAIL            0.52s   killed by signal 11 SIGSEGV",
    "  process didn't exit successfully: `/src/target/debug/deps/x-1` (signal: 11, SIGSEGV: invalid memory reference)",
    " 12 - ssl-suite (Child aborted) ***Exception: SegFault  0.42 sec",
    "subprocess.CalledProcessError: Command '['./a']' died with <Signals.SIGSEGV: 11>.",
    "SIGSEGV: segmentation violation",
]
OWN = [
    "make: *** [Makefile:3: all] Error 1",
    "make[1]: *** [Makefile:3: check] Error 2",
    "make: *** [Makefile:139: all] Error 1",
    "FAIL: test_segfault_is_reported",
    "test_parser.c:139: Assertion `x == 1' failed.",
    "prog: test.c:12: main: Assertion `1 == 2' failed.",
    "qemu: uncaught target signal 6 (Aborted) - core dumped",
    "Aborted (core dumped)",
    "make: *** [Makefile:3: all] Aborted",
    "make: *** [Makefile:3: all] Error 134",
    "ERROR:../tests/list.c:20:test_append: assertion failed: (length == 3)",
    "Bail out! ERROR:../tests/list.c:20:test_append: assertion failed: (length == 3)",
    "E       AssertionError: assert 139 == 1",
    "checking whether a Segmentation fault is caught... no",
    "ok 12 - handles SIGSEGV in the child",
    "error: expected ';' before '}' token",
    "make: *** [Makefile:9: deploy] Killed",
    "Testing qemu support: qemu-system-arm not found",
    "checking for qemu-aarch64-static... no",
    "dh_auto_test: error: make -j2 test returned exit code 2",
]


@pytest.mark.parametrize("line", FAULTS)
def test_fault(line: str) -> None:
    log = f"cc -c a.c\n{line}\nmake: *** [Makefile:3: all] Error 2\n"
    assert find_emulator_fault(log, 2) == line.strip()
    assert find_emulator_fault(log, 0) == ""


@pytest.mark.parametrize("line", OWN)
def test_own_failure(line: str) -> None:
    assert find_emulator_fault(f"cc -c a.c\n{line}\n", 1) == ""
    assert find_emulator_fault("\n".join(OWN), 2) == ""


@pytest.mark.parametrize(
    ("status", "name"), [(139, "SIGSEGV"), (132, "SIGILL"), (135, "SIGBUS"), (133, "SIGTRAP"), (-11, "SIGSEGV")]
)
def test_status_alone(status: int, name: str) -> None:
    assert find_emulator_fault("", status) == f"ended by {name} (exit status {status})"


@pytest.mark.parametrize("status", [1, 2, 11, 4, 124, 126, 127, 128, 130, 134, 137, 143, 255, -6, -9, -15, 1000])
def test_other_statuses_say_nothing(status: int) -> None:
    assert find_emulator_fault("", status) == ""


def test_what_qemu_says_goes_before_what_others_say_of_it() -> None:
    log = "qemu: uncaught target signal 11 (Segmentation fault) - core dumped\nSegmentation fault\nmake: *** [a] Error 139\n"
    assert find_emulator_fault(log, 2).startswith("qemu: uncaught")


def test_the_reason_is_fit_for_a_terminal() -> None:
    log = f"\x1b[31mqemu: uncaught target signal 11 (Segmentation fault) - \x1b]0;owned\x07core dumped{'x' * 10_000}\x1b[0m"
    reason = find_emulator_fault(log, 2)
    assert reason.startswith("qemu: uncaught target signal 11 (Segmentation fault) - ")
    assert reason.isprintable()
    assert len(reason) <= 200


@pytest.mark.timeout(20)
def test_hostile_logs_are_read_in_time() -> None:
    for line in (
        "*** [" * 10_000,
        "x: line 1: 1 " * 5_000,
        "ERROR:" + "tcg/" * 10_000,
        "qemu-" + "a-" * 20_000,
        "(signal: 4, SIGILL: " * 3_000,
    ):
        assert find_emulator_fault(line, 1) == ""
