"""The host's end of a build, against a guest that may be hostile.

The guest is a fake that says what each test wants; tests/integration/test_agent.py holds it against a real agent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from offloadd.builder import course
from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.run import run_build
from offloadd.errors import BuildFailedError, BuildTimeoutError, HostError, ProtocolError, SshError, UsageError
from offloadd.guest.frames import HOST_KINDS, PIECE, Decoder, Frame, encode

from .fake_guest import FakeGuest

CLOCK = 1_577_836_800.0


def event(name: str, **fields: Any) -> bytes:
    return encode(b"E", json.dumps({"event": name, **fields}).encode())


STARTED = event("started", clock=CLOCK + 2, cpu="a cpu", kernel="6.1")
PASSED = event("exit", status=0, step=2, clock=CLOCK + 5)
NO_OUTPUTS = event("outputs", missing=[])
END = encode(b"o") + encode(b"D")


class Recorder:
    """A listener."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def started(self, report: Report) -> None:
        self.said.append(("started", report.started["cpu"]))

    def step(self, index: int, count: int, command: str) -> None:
        self.said.append((index, count, command))

    def log(self, text: str) -> None:
        self.said.append(text)

    def collecting(self) -> None:
        self.said.append("collecting")


class Case:
    """One job in one folder."""

    def __init__(self, folder: Path) -> None:
        self.outputs = folder / "outputs.tar"
        self.source = folder / "source.tar"
        self.source.write_bytes(b"s" * (PIECE + 1))
        self.recorder = Recorder()

    def job(self, **changes: Any) -> Job:
        values: dict[str, Any] = {
            "build": "b1",
            "name": "hello-2.10",
            "steps": ("make", "make check"),
            "env": {"A": "b"},
            "outputs": ("hello",),
            "source": self.source,
            "environment": "env-b1",
            "set_clock": int(CLOCK),
            "expected_clock": lambda: CLOCK,
            "timeout_s": 1000.0,
            "max_silent_s": 100.0,
            "keep_failed": False,
        }
        return Job(**values | changes)

    async def run(self, guest: FakeGuest, **changes: Any) -> Report:
        self.outputs.unlink(missing_ok=True)
        with open_outputs_receiver(self.outputs) as outputs:
            try:
                return await run_build(guest, self.job(**changes), outputs, self.recorder)
            finally:
                assert guest.closed

    async def fail(self, error: type[Exception], match: str, *script: bytes | float, **changes: Any) -> Any:
        with pytest.raises(error, match=match) as caught:
            await self.run(FakeGuest(*script), **changes)
        return caught.value


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def good(*, cut: Callable[[bytes], list[bytes | float]] = lambda data: [data]) -> list[bytes | float]:
    data = STARTED + event("step", index=1, count=2, command="x") + encode(b"L", b"caf\xc3") + encode(b"L", b"\xa9\n")
    data += (
        event("step", index=2, count=2, command="y") + PASSED + encode(b"O", b"tar") + encode(b"O", b"ball") + NO_OUTPUTS + END
    )
    return cut(data)


@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_a_good_build(case: Case, size: int) -> None:
    guest = FakeGuest(*good(cut=lambda data: [data[at : at + size] for at in range(0, len(data), size)]))
    report = await case.run(guest)
    assert (report.exit_status, report.failed_step, report.missing_outputs) == (0, 0, ())
    assert case.outputs.read_bytes() == b"tarball"
    # The commands are ours, not those that the guest claims to run.
    assert case.recorder.said == [("started", "a cpu"), (1, 2, "make"), "caf", "é\n", (2, 2, "make check"), "collecting"]


async def test_what_is_sent(case: Case) -> None:
    guest = FakeGuest(1.0, *good())
    await case.run(guest)
    begin, *pieces = Decoder(HOST_KINDS).feed(guest.process.sent)
    assert begin.json() == {
        "protocol": 3,
        "build": "b1",
        "environment": "env-b1",
        "source": None,
        "scratch": None,
        "personality": None,
        "network": False,
        "date": int(CLOCK),
        "directory": "/build/hello-2.10",
        "steps": ["make", "make check"],
        "env": {"A": "b"},
        "outputs": ["hello"],
        "keep_failed": False,
    }
    assert pieces == [Frame(b"S", b"s" * PIECE), Frame(b"S", b"s"), Frame(b"s")]


async def test_a_step_that_fails(case: Case) -> None:
    report = await case.run(FakeGuest(STARTED + event("exit", status=2, step=1, clock=CLOCK) + encode(b"D")))
    assert (report.exit_status, report.failed_step) == (2, 1)
    assert case.outputs.read_bytes() == b""


async def test_the_build_directory_of_a_build_that_failed(case: Case) -> None:
    script = STARTED + event("exit", status=2, step=1, clock=CLOCK) + encode(b"O", b"all") + event("outputs", missing=[]) + END
    report = await case.run(FakeGuest(script), keep_failed=True)
    assert report.exit_status == 2
    assert case.outputs.read_bytes() == b"all"
    await case.fail(
        ProtocolError,
        "without its outputs",
        STARTED + event("exit", status=2, step=1, clock=CLOCK) + encode(b"D"),
        keep_failed=True,
    )


async def test_outputs_that_are_missing(case: Case) -> None:
    script = STARTED + PASSED + event("outputs", missing=["hello", "forged"]) + END
    error = await case.fail(BuildFailedError, "no file matches the outputs hello$", script)
    assert error.exit_status == 1
    await case.fail(ProtocolError, "without its outputs", STARTED + PASSED + encode(b"D"))


@pytest.mark.parametrize(
    "script",
    [
        encode(b"O", b"x"),
        encode(b"o"),
        encode(b"D"),
        PASSED,
        NO_OUTPUTS,
        event("step", index=1),
        STARTED + STARTED,
        STARTED + encode(b"O", b"x"),
        STARTED + encode(b"D"),
        STARTED + NO_OUTPUTS,
        STARTED + event("step", index=2),
        STARTED + event("step", index=0),
        STARTED + event("step", index=1) + event("step", index=1),
        STARTED + event("step", index=1) + event("step", index=2) + event("step", index=3),
        STARTED + event("step"),
        STARTED + event("step", index=-1),
        STARTED + event("step", index=True),
        STARTED + event("step", index=10**9),
        STARTED + event("exit", status="0", step=1, clock=CLOCK),
        STARTED + event("exit", status=0.0, step=1, clock=CLOCK),
        STARTED + event("exit", status=-1, step=1, clock=CLOCK),
        STARTED + event("exit", status=0, step=1),
        STARTED + event("exit", status=0, step=1, clock=True),
        STARTED + event("exit", status=0, step=1, clock=10**400),
        STARTED + event("exit", status=0, step=1, clock=float("nan")),
        STARTED + PASSED + PASSED,
        STARTED + PASSED + event("outputs", missing=5),
        STARTED + PASSED + event("outputs"),
        STARTED + PASSED + encode(b"o") + encode(b"o"),
        STARTED + PASSED + encode(b"o") + encode(b"O", b"more"),
        STARTED + PASSED + NO_OUTPUTS + END + encode(b"L", b"after the end"),
        event("surprise"),
        encode(b"E", b"{}"),
        encode(b"E", b"[1]"),
        encode(b"E", b"not JSON"),
        encode(b"E", b"[" * 10_000),
        encode(b"E", b'{"event": ["started"]}'),
        # Half a surrogate pair: JSON, but nothing that could be stored or shown.
        event("started", clock=CLOCK, cpu="\ud800"),
        event("error", what="\udcff"),
        encode(b"E", b'{"event": ' + b"[" * 900 + b"]" * 900 + b"}"),
        b"X\0\0\0\0",
        b"B\0\0\0\0",
        b"L\xff\xff\xff\xff",
        b"\0" * 100,
    ],
)
async def test_a_guest_that_does_not_keep_to_the_protocol(case: Case, script: bytes) -> None:
    error = await case.fail(ProtocolError, "the guest", script)
    assert error.exit_status == 75


@pytest.mark.parametrize(
    "clock",
    ["CLOCK", CLOCK + 120.1, CLOCK - 120.1, 0, -1e300, 10**400, float("nan"), float("inf"), None, [], {"a": 1}, "x" * 1000],
)
async def test_a_wrong_clock_ends_the_build_before_it_starts(case: Case, clock: object) -> None:
    error = await case.fail(
        ProtocolError, "the guest's clock shows .*, not 2020-01-01T00:00:00Z", event("started", clock=clock)
    )
    assert case.recorder.said == []
    assert len(error.what) < 300


@pytest.mark.parametrize("clock", [CLOCK, CLOCK + 120, CLOCK - 120, int(CLOCK)])
async def test_a_clock_that_is_near_enough(case: Case, clock: float) -> None:
    await case.run(FakeGuest(event("started", clock=clock, cpu="c") + PASSED + NO_OUTPUTS + END))


async def test_the_service_tells_what_is_wrong(case: Case) -> None:
    error = await case.fail(ProtocolError, "no disk env-b1", event("error", what="no \x1b[31mdisk env-b1\r"))
    assert "\x1b" not in error.what


async def test_a_service_that_ends_early_is_told_with_its_last_words(
    case: Case, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(SshError, match="ended early") as caught:
        await case.run(FakeGuest(b"", errors=b"sudo: a \x1b[2Jpassword is required\n"))
    assert caught.value.detail == "sudo: a password is required\n"


async def test_what_a_service_said_comes_before_the_broken_pipe(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    guest = FakeGuest(0.5, event("error", what="the disk is full"), send_error=SshError("broken pipe"))
    with pytest.raises(ProtocolError, match="the disk is full"):
        await case.run(guest)
    with pytest.raises(SshError, match="broken pipe"):
        await case.run(FakeGuest(send_error=SshError("broken pipe")))


async def test_a_guest_that_does_not_begin(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    await case.fail(SshError, "did not begin the build within 15m00s")
    assert trio.current_time() - began == pytest.approx(course.PREPARE_S)


async def test_a_build_that_is_silent_for_too_long(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    # What it prints, and nothing else, starts the time anew.
    script: list[bytes | float] = [STARTED, 90.0, encode(b"L", b"."), 90.0, encode(b"L", b"."), 99.0, event("step", index=1)]
    error = await case.fail(BuildTimeoutError, "no output for 1m40s", *script)
    assert (error.exit_status, error.hint) == (124, "--max-silent-time")
    assert trio.current_time() - began == pytest.approx(90 + 90 + 100)


async def test_a_build_that_takes_too_long(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    script: list[bytes | float] = [500.0, STARTED]
    for _ in range(100):
        script += [50.0, encode(b"L", b".")]
    error = await case.fail(BuildTimeoutError, "took longer than 16m40s", *script)
    assert error.hint == "--timeout"
    # The time that the guest takes to prepare is not the build's.
    assert trio.current_time() - began == pytest.approx(500 + 1000)


async def test_collecting_may_be_silent(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    report = await case.run(FakeGuest(STARTED, 50.0, PASSED, 500.0, encode(b"O", b"x") + NO_OUTPUTS + END))
    assert report.duration_s == pytest.approx(50)


async def test_a_log_without_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "MAX_LOG_BYTES", 1 << 20)
    await case.fail(BuildFailedError, "log is larger than 1 MiB", STARTED, *[encode(b"L", b"x" * PIECE)] * 20)
    # Each piece becomes an event, which is larger than a byte.
    await case.fail(BuildFailedError, "log is larger than 1 MiB", STARTED, *[encode(b"L", b"x") * 1000] * 20)


async def test_outputs_that_cannot_be_read_are_the_build_s_doing(case: Case) -> None:
    error = event("error", what="hello: Permission denied")
    await case.fail(BuildFailedError, "outputs cannot be sent: hello: Permission denied", STARTED + PASSED + error)
    ended = STARTED + event("step", index=1, count=2, command="x") + event("exit", status=2, step=1, clock=CLOCK)
    await case.fail(BuildFailedError, "step 1 of 2 failed with exit status 2, and its dir", ended + error, keep_failed=True)
    await case.fail(ProtocolError, "Permission denied", STARTED + error)


async def test_outputs_without_end(case: Case) -> None:
    with (
        open_outputs_receiver(case.outputs, max_bytes=1000) as outputs,
        pytest.raises(BuildFailedError, match="larger than 1000 bytes"),
    ):
        guest = FakeGuest(STARTED + PASSED + encode(b"O", b"x" * 1001))
        await run_build(guest, case.job(), outputs, case.recorder)


async def test_a_recipe_that_no_frame_holds(case: Case) -> None:
    await case.fail(UsageError, "larger than 1024 KiB", steps=("x" * (1 << 20),))


async def test_a_build_that_is_cancelled_closes_its_channel(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    guest = FakeGuest(STARTED)
    with trio.move_on_after(10) as scope:
        await case.run(guest)
    assert scope.cancelled_caught
    assert guest.closed


async def test_what_is_sent_for_a_build_on_this_host(case: Case) -> None:
    guest = FakeGuest(1.0, *good())
    await case.run(guest, environment="/roots/1/root", set_clock=None, personality="linux32", network=True)
    begin, *_ = Decoder(HOST_KINDS).feed(guest.process.sent)
    assert (
        begin.json().items()
        >= {
            "environment": "/roots/1/root",
            "date": None,
            "personality": "linux32",
            "network": True,
        }.items()
    )


def ending(clock: float) -> bytes:
    return event("exit", status=0, step=2, clock=clock) + NO_OUTPUTS + END


@pytest.mark.parametrize("set_clock", [None, int(CLOCK)])
async def test_the_clock_is_read_again_at_the_end(
    case: Case, autojump_clock: trio.testing.MockClock, set_clock: int | None
) -> None:
    began = trio.current_time()
    guest = FakeGuest(STARTED, 50.0, ending(CLOCK + 60))
    # Where the clock is the host's it goes on by itself; where it was set it goes on from there.
    report = await case.run(guest, set_clock=set_clock, expected_clock=lambda: CLOCK + trio.current_time() - began)
    assert (report.clock_start, report.clock_end) == (CLOCK + 2, CLOCK + 60)
    assert report.clock_drift_s == pytest.approx(8 if set_clock else 10, abs=0.1)
    assert not any("warning" in str(text) for text in case.recorder.said)


async def test_a_clock_that_ran_away_is_told_in_the_log(case: Case) -> None:
    report = await case.run(FakeGuest(STARTED, ending(CLOCK + 3600)))
    assert report.exit_status == 0
    assert report.clock_drift_s == pytest.approx(3598, abs=1)
    (text,) = [text for text in case.recorder.said if "warning" in str(text)]
    assert "shows 2020-01-01T01:00:00Z, not 2020-01-01T00:00:02Z at the end" in str(text)


async def test_a_channel_of_another_kind_that_breaks(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    """What a local service says before it ends is told, not the pipe that broke."""
    with pytest.raises(ProtocolError, match="the build service: no such environment"):
        await case.run(FakeGuest(0.5, event("error", what="no such environment"), send_error=HostError("went away")))
    with pytest.raises(HostError, match="went away"):
        await case.run(FakeGuest(send_error=HostError("went away")))
