"""The host's end of the agent's connection, against a guest that does as each test says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair

from offloadd.builder import run
from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.errors import AgentError, BuildTimeoutError, OffloadError, ProtocolError, TransientError, UsageError
from offloadd.guest import frames as build_frames
from offloadd.guest.agent import Agent, client
from offloadd.guest.agent.wire import HEAD, MAX_PAYLOAD, WINDOW, encode
from offloadd.guest.open import check_clock, install_secrets
from offloadd.nursery import open_narrow_nursery
from offloadd.place.vm import GuestService


class Peer:
    """The guest's end."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._left = b""

    async def say(self, *frames: bytes) -> None:
        await self.stream.send_all(b"".join(frames))

    async def hear(self) -> tuple[bytes, int, bytes]:
        """The next frame of the host."""
        head = await self._exactly(HEAD)
        payload = await self._exactly(int.from_bytes(head[5:], "big"))
        return head[:1], int.from_bytes(head[1:5], "big"), payload

    async def answer_hello(self) -> None:
        kind, _, payload = await self.hear()
        assert kind == b"H"
        await self.say(encode(b"h", 0, payload))

    async def heard(self, kind: bytes) -> tuple[int, bytes]:
        got, channel, payload = await self.hear()
        assert got == kind
        return channel, payload

    async def _exactly(self, size: int) -> bytes:
        while len(self._left) < size:
            piece = await self.stream.receive_some()
            assert piece
            self._left += piece
        data, self._left = self._left[:size], self._left[size:]
        return data


@asynccontextmanager
async def connected(*, lockstep: bool = False, limit_s: float = 20.0) -> AsyncIterator[tuple[Agent, Peer]]:
    """A host that has said hello.

    Args:
        lockstep: nothing is sent that is not read.
        limit_s: none where the clock jumps: it does so too while a thread works.
    """
    ours, theirs = lockstep_stream_pair() if lockstep else memory_stream_pair()
    peer = Peer(theirs)
    async with ours, open_narrow_nursery() as nursery:
        agent = Agent(ours, "vm", nursery)
        with trio.fail_after(5):
            async with trio.open_nursery() as greeting:
                greeting.start_soon(peer.answer_hello)
                await agent.greet()
        try:
            with trio.fail_after(limit_s):
                yield agent, peer
        finally:
            nursery.cancel_scope.cancel()


def exit_frame(channel: int, status: object = 0) -> bytes:
    return encode(b"x", channel, json.dumps({"status": status}).encode())


async def fails(agent: Agent, error: type[OffloadError], match: str) -> None:
    """The connection is given up, with that error."""
    await agent.wait_lost()
    with pytest.raises(error, match=match) as caught:
        await agent.call("clock")
    assert caught.value.subject == "vm"


# Calls


async def test_calls_get_their_own_answers() -> None:
    async with connected() as (agent, peer), trio.open_nursery() as nursery:
        got: dict[str, Any] = {}

        async def call(name: str) -> None:
            got[name] = await agent.call(name, size=1)

        nursery.start_soon(call, "a")
        nursery.start_soon(call, "b")
        heard = [await peer.heard(b"C") for _ in range(2)]
        for channel, payload in reversed(heard):
            await peer.say(encode(b"A", channel, payload))
        nursery.cancel_scope.deadline = trio.current_time() + 5
        while len(got) < 2:
            await trio.lowlevel.checkpoint()
        assert got == {name: {"call": name, "size": 1} for name in "ab"}


async def test_what_is_asked_before_the_hello_goes_out_with_it() -> None:
    ours, theirs = memory_stream_pair()
    async with ours, open_narrow_nursery() as nursery:
        agent, answered = Agent(ours, "vm", nursery), list[dict[str, Any]]()

        async def greet_and_ask() -> None:
            asked = agent.ask("identify", date=1)
            await agent.greet()
            answered.append(await agent.answer("identify", asked))

        with trio.fail_after(5):
            async with trio.open_nursery() as asking:
                asking.start_soon(greet_and_ask)
                first = bytes(await theirs.receive_some())
                size = HEAD + int.from_bytes(first[5:HEAD], "big")
                hello, question = first[:size], first[size:]
                assert (hello[:1], question[:1]) == (b"H", b"C")
                # Both answers come in one piece too.
                answer = encode(b"h", 0, hello[HEAD:]) + encode(b"A", int.from_bytes(question[1:5], "big"), b'{"clock": 1}')
                await theirs.send_all(answer)
        assert answered == [{"clock": 1}]
        nursery.cancel_scope.cancel()


async def test_a_call_ends_by_its_limit_and_its_answer_may_come_late(autojump_clock: trio.testing.MockClock) -> None:
    async with connected(limit_s=math.inf) as (agent, peer):
        with pytest.raises(AgentError, match="gave no answer to clock within 60 s"):
            await agent.call("clock")
        channel, _ = await peer.heard(b"C")
        await peer.say(encode(b"A", channel, b"{}"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.call, "clock")
            channel, _ = await peer.heard(b"C")
            await peer.say(encode(b"A", channel, b"{}"))
        assert not agent._ending


async def test_what_the_guest_cannot_do_is_told_without_its_control_characters() -> None:
    async with connected() as (agent, peer), trio.open_nursery() as nursery:

        async def answer() -> None:
            channel, _ = await peer.heard(b"C")
            await peer.say(encode(b"A", channel, json.dumps({"error": "\x1b[2Jno" + "!" * 1000}).encode()))

        nursery.start_soon(answer)
        with pytest.raises(AgentError, match=r"^vm: the guest cannot do clock: no!+$") as caught:
            await agent.call("clock")
        assert len(caught.value.what) < 400


@pytest.mark.parametrize("payload", [b"", b"[" * 9000, b'{"clock": "\\ud800"}', b"null", b'{"clock": ' + b"1" * 5000 + b"}"])
async def test_an_answer_that_is_no_answer(payload: bytes) -> None:
    async with connected() as (agent, peer), trio.open_nursery() as nursery:

        async def answer() -> None:
            channel, _ = await peer.heard(b"C")
            await peer.say(encode(b"A", channel, payload))

        nursery.start_soon(answer)
        with pytest.raises(ProtocolError, match=r"not JSON|not a JSON object"):
            await agent.call("clock")


@pytest.mark.parametrize("clock", ["NaN", "Infinity", "-Infinity", "1" * 400, "true", "null", '"x"', "[]", "0", "1000121"])
def test_a_clock_that_is_none(clock: str) -> None:
    with pytest.raises(AgentError, match="its clock does not show"):
        check_clock(json.loads(f'{{"clock": {clock}}}'), 1e6, "vm")
    check_clock({"clock": 1e6 + 119}, 1e6, "vm")


@pytest.mark.parametrize("uptime", ["NaN", "Infinity", "1" * 400, "-1", "true", "null", '"x"'])
def test_an_uptime_that_is_none(uptime: str) -> None:
    with pytest.raises(AgentError, match="its clock does not show"):
        check_clock(json.loads(f'{{"clock": 5.0, "uptime": {uptime}}}'), 5.0, "vm")


def test_next_to_1970_a_clock_shows_how_long_its_guest_has_run() -> None:
    check_clock({"clock": 500.0, "uptime": 499.0}, 5.0, "vm")
    with pytest.raises(AgentError):
        check_clock({"clock": 500.0, "uptime": 300.0}, 5.0, "vm")


# What breaks the connection


BROKEN = {
    "an answer nobody asked for": (encode(b"A", 77, b"{}"), ProtocolError, "channel 77 that is not open"),
    "output of no program": (encode(b"O", 77, b"x"), ProtocolError, "channel 77 that is not open"),
    "window of no program": (encode(b"W", 77, b"\0\0\0\1"), ProtocolError, "channel 77 that is not open"),
    "exit of no program": (exit_frame(77), ProtocolError, "channel 77 that is not open"),
    "another agent's hello": (encode(b"h", 0, b"offload-agent 1 "), AgentError, "was started again"),
    "what a new agent fills up with": (bytes(HEAD), AgentError, "was started again"),
    "garbage": (b"\xff" * 100, ProtocolError, "unknown kind"),
    "a window that was not used": (encode(b"W", 1, b"\0\0\0\1"), ProtocolError, "took 1 bytes of input, which were not sent"),
    "an empty window": (encode(b"W", 1, bytes(4)), ProtocolError, "took 0 bytes"),
    "output over the window": (encode(b"O", 1, bytes(MAX_PAYLOAD)) * 5, ProtocolError, "more output than was asked for"),
    "both streams over the window": (
        (encode(b"O", 1, bytes(MAX_PAYLOAD)) + encode(b"E", 1, bytes(MAX_PAYLOAD))) * 2 + encode(b"E", 1, b"x"),
        ProtocolError,
        "more output than was asked for",
    ),
    "exit twice": (exit_frame(1) * 2, ProtocolError, "channel 1 that is not open"),
    "output after the exit": (exit_frame(1) + encode(b"O", 1, b"x"), ProtocolError, "channel 1 that is not open"),
    "a status that is none": (exit_frame(1, "0"), ProtocolError, "exit status '0'"),
    "a status over 255": (exit_frame(1, 256), ProtocolError, "exit status 256"),
    "a status that is true": (exit_frame(1, status=True), ProtocolError, "exit status True"),
    "a status without end": (encode(b"x", 1, b'{"status": ' + b"9" * 4000 + b"}"), ProtocolError, "exit status 999"),
    "an exit that says nothing": (encode(b"x", 1, b"{}"), ProtocolError, "exit status None"),
    "an answer to a program": (encode(b"A", 1, b"{}"), ProtocolError, "channel 1 that is not open"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_what_breaks_the_connection(case: str) -> None:
    said, error, match = BROKEN[case]
    async with connected() as (agent, peer), agent.open_process("p") as process:
        assert process.channel == 1
        await peer.heard(b"R")
        await peer.say(said)
        await fails(agent, error, match)
        with pytest.raises(error, match=match):
            while await process.receive():
                pass
            await process.send(b"x")


async def test_a_connection_that_closes() -> None:
    async with connected() as (agent, peer), agent.open_process("p") as process:
        await peer.heard(b"R")
        await peer.say(encode(b"O", 1, b"last words"))
        await peer.stream.aclose()
        assert await process.receive() == b"last words"
        for wait in (process.receive, process.receive_error, process.wait, process.send_eof):
            with pytest.raises(AgentError, match=r"channel (was closed|broke)"):
                await wait()
        await fails(agent, AgentError, r"channel (was closed|broke)")


async def test_a_hello_that_never_comes_ends_by_the_callers_limit(autojump_clock: trio.testing.MockClock) -> None:
    ours, _ = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(10) as limit:
            await Agent(ours, "vm", nursery).greet(adopted=True)
    assert limit.cancelled_caught


async def test_a_channel_that_closes_before_its_hello() -> None:
    ours, theirs = memory_stream_pair()
    await theirs.send_all(b"a console's words")
    await theirs.aclose()
    async with trio.open_nursery() as nursery:
        with pytest.raises(AgentError, match="broke before its hello"):
            await Agent(ours, "vm", nursery).greet()


# Memory


async def test_a_flood_of_tiny_pieces_costs_no_more_than_the_bytes_in_them() -> None:
    async with connected() as (agent, peer), agent.open_process("p") as process:
        await peer.heard(b"R")
        await peer.say(encode(b"O", 1, b"x") * WINDOW)
        while len(process._output) < WINDOW:
            await trio.lowlevel.checkpoint()
        assert sys.getsizeof(process._output) < 2 * WINDOW
        assert await process.receive() == b"x" * WINDOW
        assert await peer.heard(b"W") == (1, WINDOW.to_bytes(4, "big"))


async def test_what_comes_for_a_program_that_nobody_wants_is_only_counted() -> None:
    async with connected() as (agent, peer):
        async with agent.open_process("p") as process:
            await peer.heard(b"R")
        await peer.heard(b"X")
        await peer.say(encode(b"O", 1, bytes(MAX_PAYLOAD)) * 4)
        await peer.say(encode(b"x", 1, b'{"error": "closed"}'))
        async with agent.open_process("p") as second:
            await peer.heard(b"R")
            await peer.say(exit_frame(second.channel))
            assert await second.wait() == 0
        assert not process._output
        assert not agent._ending
        async with agent.open_process("p"):
            await peer.heard(b"R")
        await peer.heard(b"X")
        await peer.say(encode(b"O", 3, bytes(MAX_PAYLOAD)) * 5)
        await fails(agent, ProtocolError, "more output than was asked for")


async def test_a_guest_that_never_says_an_end() -> None:
    async with connected() as (agent, _):
        for _ in range(client.MAX_ENDING + 1):
            async with agent.open_process("p"):
                pass
        await fails(agent, AgentError, "1000 programs and calls do not end")


async def test_a_guest_that_reads_nothing() -> None:
    """Whoever sends can be cancelled; what waits to be sent stays small; leaving the block waits for nothing."""
    async with connected(lockstep=True) as (agent, peer):
        for _ in range(50):
            async with agent.open_process("p") as process:
                with trio.move_on_after(0.01) as limit:
                    await process.send(bytes(10 * WINDOW))
                assert limit.cancelled_caught
        assert sum(len(posted.frame) for posted in agent._outgoing) < 2 * MAX_PAYLOAD
        # And then it does: nothing was cut off.
        kinds = b""
        while kinds.count(b"X") < 50:
            kind, _, _ = await peer.hear()
            kinds += kind
        assert set(kinds.decode()) <= set("RIX")
        with trio.move_on_after(0.01):
            await agent.call("clock")
        await peer.heard(b"C")


# Streams


async def test_a_flood_from_a_guest_that_reads_nothing() -> None:
    """What is given back to its window is not piled up for it: it has sent more than it was told to."""
    async with connected(lockstep=True) as (agent, peer), trio.open_nursery() as nursery:
        sent = 0

        async def take() -> None:
            async with agent.open_process("chatter") as process:
                with pytest.raises(ProtocolError, match="more output than was asked for"):
                    while await process.receive_error():
                        pass

        async def flood(channel: int) -> None:
            nonlocal sent
            with suppress(trio.BrokenResourceError):
                while sent < 100 * WINDOW:
                    await peer.say(encode(b"E", channel, bytes(MAX_PAYLOAD)))
                    sent += MAX_PAYLOAD

        nursery.start_soon(take)
        channel, _ = await peer.heard(b"R")
        await flood(channel)
        assert sent <= 2 * WINDOW


async def test_input_goes_as_far_as_the_window() -> None:
    async with connected() as (agent, peer), agent.open_process("p") as process, trio.open_nursery() as nursery:
        await peer.heard(b"R")
        sent = trio.Event()

        async def send() -> None:
            await process.send(b"y" * (WINDOW + 10))
            sent.set()

        nursery.start_soon(send)
        for _ in range(WINDOW // MAX_PAYLOAD):
            assert await peer.heard(b"I") == (1, b"y" * MAX_PAYLOAD)
        await trio.testing.wait_all_tasks_blocked()
        assert not sent.is_set()
        await peer.say(encode(b"W", 1, b"\0\0\0\7"))
        assert await peer.heard(b"I") == (1, b"y" * 7)
        await peer.say(encode(b"W", 1, b"\0\0\0\7"))
        assert await peer.heard(b"I") == (1, b"y" * 3)
        await sent.wait()


async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    async with connected(lockstep=True) as (agent, peer), agent.open_process("p") as process:
        await peer.heard(b"R")
        await peer.say(encode(b"O", 1, bytes(MAX_PAYLOAD)))
        # The guest does not read the window that is given back.
        with trio.move_on_after(5):
            assert await process.receive() == bytes(MAX_PAYLOAD)
        with trio.move_on_after(0.01) as limit:
            await process.receive()
        assert limit.cancelled_caught
        await peer.say(encode(b"O", 1, b"x"))
        assert await process.receive() == b"x"


async def test_writing_to_a_program_that_has_ended() -> None:
    async with connected() as (agent, peer), agent.open_process("p") as process:
        await peer.heard(b"R")
        await peer.say(encode(b"E", 1, b"oh\n") + exit_frame(1, 7))
        assert await process.wait() == 7
        with pytest.raises(AgentError, match="the program has ended"):
            await process.send(b"x")
        await process.send_eof()
        await process.signal(15)
        assert await process.receive_error() == b"oh\n"
        assert await process.receive_error() == await process.receive() == b""


async def test_a_sender_learns_that_the_program_has_ended() -> None:
    async with connected() as (agent, peer), agent.open_process("p") as process, open_narrow_nursery() as nursery:

        async def end() -> None:
            for kind in (b"R", *([b"I"] * 4)):
                await peer.heard(kind)
            await peer.say(exit_frame(1))

        nursery.start_soon(end)
        with pytest.raises(AgentError, match="the program has ended"):
            await process.send(bytes(2 * WINDOW))


async def test_a_command_that_is_too_long() -> None:
    async with connected() as (agent, _):
        with pytest.raises(UsageError, match="longer than 64 KiB"):
            async with agent.open_process("/bin/sh", "-c", "x" * MAX_PAYLOAD):
                pass


# Builds


class Quiet:
    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def collecting(self) -> None: ...
    def log(self, text: str) -> None: ...


async def build(agent: Agent, folder: Path) -> Report:
    source = folder / "source.tar"
    source.write_bytes(bytes(10 * WINDOW))
    job = Job(
        build="b", name="r-1", steps=("make",), env={}, outputs=(), source=source, environment=None, set_clock=None,
        expected_clock=lambda: 5.0, timeout_s=60.0, max_silent_s=60.0, keep_failed=False,
    )  # fmt: skip
    with open_outputs_receiver(folder / "outputs.tar") as outputs:
        return await run.run_build(GuestService(agent), job, outputs, Quiet())


async def silent(peer: Peer) -> None:
    """Reads everything and says nothing."""
    while True:
        await peer.hear()


async def reads_nothing(peer: Peer) -> None: ...


async def stops_after_start(peer: Peer) -> None:
    """Begins the build and then never says or reads anything."""
    channel, _ = await peer.heard(b"R")
    started = build_frames.encode(b"E", b'{"event": "started", "clock": 5.0, "cpu": "c"}')
    await peer.say(encode(b"O", channel, started))


@pytest.mark.parametrize(
    ("guest", "error"), [(silent, TransientError), (reads_nothing, TransientError), (stops_after_start, BuildTimeoutError)]
)
@pytest.mark.parametrize("lockstep", [False, True])
async def test_a_build_ends_by_its_limit(
    guest: Callable[[Peer], Any],
    error: type[OffloadError],
    lockstep: bool,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with connected(lockstep=lockstep, limit_s=math.inf) as (agent, peer), trio.open_nursery() as nursery:
        nursery.start_soon(guest, peer)
        with pytest.raises(error):
            await build(agent, tmp_path)
        nursery.cancel_scope.cancel()


async def test_secrets_for_a_guest_that_takes_none(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    (tmp_path / "key").write_text("x")
    async with connected(lockstep=True, limit_s=math.inf) as (agent, _):
        with pytest.raises(AgentError, match="did not install its secrets within 60 s"):
            await install_secrets(agent, tmp_path)
