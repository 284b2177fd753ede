"""The guest's real agent and the host's end of it."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from offloadd.builder import run
from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver, unpack_outputs
from offloadd.errors import AgentError, OffloadError
from offloadd.guest.agent import Agent, AgentProcess
from offloadd.guest.agent.wire import HEAD, MAX_PAYLOAD, WINDOW, Hello, encode
from offloadd.guest.frames import encode as encode_build
from offloadd.guest.secret_service import ProcessStream, read_secret_root, receive_hello, send_secrets

from ..unit.fake_guest import FakeGuest
from .real_agent import LIMIT_S, RealAgent, open_real_agent

SH = "/bin/sh"


@pytest.fixture
async def real() -> AsyncIterator[RealAgent]:
    async with open_real_agent() as opened:
        yield opened


@pytest.fixture
async def agent(real: RealAgent) -> AsyncIterator[Agent]:
    async with real.connect() as connected:
        yield connected


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():
            await trio.sleep(0.01)


# Programs


async def test_a_command_and_its_status(agent: Agent) -> None:
    assert await agent.run(SH, "-c", "printf 'a\\0b'") == (0, b"a\0b")
    assert await agent.run(SH, "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n")
    assert await agent.run(SH, "-c", "kill -TERM $$") == (128 + signal.SIGTERM, b"")
    assert await agent.run("/bin/cat") == (0, b"")  # there is nothing on its standard input
    assert await agent.run("printf", "%s", os.fsdecode(b"\xff\xc3\xa9")) == (0, b"\xff\xc3\xa9")


async def test_a_program_may_say_more_than_anybody_takes(agent: Agent) -> None:
    status, output = await agent.run(SH, "-c", "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; exit 5")
    assert (status, len(output)) == (5, 1 << 20)


async def test_programs_find_a_plain_place(agent: Agent) -> None:
    status, output = await agent.run(
        SH, "-c", "echo $PATH $HOME $LANG; ps -o sid= -p $$ | tr -d ' '; echo $$; ls /proc/self/fd"
    )
    assert status == 0
    environment, session, pid, *descriptors = output.decode().split("\n")
    assert environment == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /root C.UTF-8"
    assert session == pid
    # The last is the directory that ls reads.
    assert descriptors == ["0", "1", "2", "3", ""]
    # Python ignores these two.
    status, output = await agent.run("grep", "SigIgn", "/proc/self/status")
    assert not int(output.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


@pytest.mark.parametrize("program", ["/bin/missing", "/etc/passwd", "", "a\0b", "/"])
async def test_a_program_that_cannot_be_started(agent: Agent, program: str) -> None:
    with pytest.raises(AgentError, match=r"the agent cannot run a program: (FileNotFound|Permission|Value)Error"):
        await agent.run(program)
    assert (await agent.run("true"))[0] == 0


async def test_output_is_there_as_soon_as_it_is_printed(agent: Agent) -> None:
    async with agent.open_process(SH, "-c", "echo first; read -r _; echo second >&2; read -r _") as process:
        assert await process.receive() == b"first\n"
        await process.send(b"\n")
        assert await process.receive_error() == b"second\n"
        await process.send_eof()
        assert await process.receive() == b""
        assert await process.wait() == 1


async def test_much_in_both_directions_at_once(agent: Agent) -> None:
    data = os.urandom(9_000_000)
    async with agent.open_process(SH, "-c", "cat; echo done >&2") as process, trio.open_nursery() as nursery:
        received = bytearray()

        async def send() -> None:
            for at in range(0, len(data), 1_000_000):
                await process.send(data[at : at + 1_000_000])
            await process.send_eof()

        nursery.start_soon(send)
        while piece := await process.receive():
            received += piece
        assert await process.receive_error() == b"done\n"
        assert await process.wait() == 0
    assert received == data


async def test_many_programs_at_once(agent: Agent) -> None:
    results = {}

    async def work(number: int) -> None:
        async with agent.open_process(SH, "-c", f"cat | wc -c; exit {number}") as process:
            await process.send(bytes(number * 10_000))
            await process.send_eof()
            output = await process.receive()
            results[number] = (await process.wait(), int(output))

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(work, number)
    assert results == {number: (number, number * 10_000) for number in range(40)}


async def test_one_that_nobody_reads_holds_up_nobody_else(agent: Agent) -> None:
    async with agent.open_process("yes") as flood, agent.open_process("sleep", "60") as deaf:
        await flood.receive()
        with trio.move_on_after(0.5):
            await deaf.send(bytes(10 * WINDOW))
        assert await agent.run(SH, "-c", "echo hello") == (0, b"hello\n")
        assert abs((await agent.call("clock"))["clock"] - time.time()) < LIMIT_S


async def test_signals_reach_what_a_program_has_started(agent: Agent) -> None:
    script = (
        "trap 'wait; echo caught; exit 9' USR1; (trap 'echo child; exit' USR1; echo ready; while :; do sleep 0.05; done) & wait"
    )
    async with agent.open_process(SH, "-c", script) as process:
        assert await process.receive() == b"ready\n"
        await process.signal(signal.SIGUSR1)
        said = b""
        while piece := await process.receive():
            said += piece
        assert sorted(said.split()) == [b"caught", b"child"]
        assert await process.wait() == 9
    async with agent.open_process("sleep", "60") as process:
        await process.signal(signal.SIGKILL)
        assert await process.wait() == 128 + signal.SIGKILL
    async with agent.open_process("cat") as process:
        await process.signal(250)  # there is none
        await process.send_eof()
        assert await process.wait() == 0


async def test_a_program_ends_although_something_in_the_background_holds_its_output(agent: Agent) -> None:
    status, output = await agent.run(SH, "-c", "head -c 100000 /dev/zero; sleep 60 & exit 3")
    assert (status, len(output)) == (3, 100_000)


async def test_a_program_ends_although_something_in_the_background_goes_on_writing(agent: Agent) -> None:
    status, output = await agent.run(SH, "-c", "echo first; yes & exit 4")
    assert status == 4
    assert output.startswith(b"first\n")


async def test_a_program_that_has_filled_the_window_and_ended(agent: Agent) -> None:
    """Its exit is told when its output is taken, also when others hold its pipes."""
    async with agent.open_process(SH, "-c", f"head -c {WINDOW} /dev/zero; sleep 60 & exit 6") as process:
        await until(lambda: len(process._output) == WINDOW)
        size = 0
        while piece := await process.receive():
            size += len(piece)
        assert (size, await process.wait()) == (WINDOW, 6)


async def test_a_program_that_does_not_read_its_input(agent: Agent) -> None:
    """It goes nowhere, and stands in nobody's way."""
    async with agent.open_process(SH, "-c", "exec <&-; echo closed; sleep 1; echo end") as process:
        assert await process.receive() == b"closed\n"
        for _ in range(20):
            await process.send(bytes(WINDOW // 2))
        await process.send_eof()
        assert await process.receive() == b"end\n"
        assert await process.wait() == 0
    async with agent.open_process("true") as process:
        with pytest.raises(AgentError, match="the program has ended"):
            while True:
                await process.send(bytes(1 << 20))
        assert await process.wait() == 0


async def test_cancelling_a_read_leaves_the_channel_usable(agent: Agent) -> None:
    async with agent.open_process("cat") as process:
        with trio.move_on_after(0.1) as scope:
            await process.receive()
        assert scope.cancelled_caught
        await process.send(b"x")
        assert await process.receive() == b"x"


async def test_leaving_the_block_hangs_up(agent: Agent, real: RealAgent, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    async with agent.open_process(SH, "-c", f"trap 'echo hup > {seen}; exit' HUP; echo started; sleep 60 & wait") as process:
        assert await process.receive() == b"started\n"
    await until(seen.exists)
    async with agent.open_process(SH, "-c", f"trap '' HUP; echo started; cat; echo ended > {seen}") as process:
        assert await process.receive() == b"started\n"
    await until(lambda: seen.read_text() == "ended\n")
    await until(lambda: not real.children() and not agent._ending)


async def test_nothing_is_left_of_what_has_ended(agent: Agent, real: RealAgent) -> None:
    async def use() -> None:
        await agent.run("true")
        with pytest.raises(AgentError):
            await agent.run("/bin/missing")
        async with agent.open_process("sleep", "60"):
            pass

    await use()
    await until(lambda: not real.children())
    before = real.descriptors()
    for _ in range(20):
        await use()
    await until(lambda: not real.children())
    await until(lambda: not agent._ending and real.descriptors() == before)
    assert not agent._processes


# Calls


async def test_calls_that_the_guest_does_not_know(agent: Agent) -> None:
    with pytest.raises(AgentError, match="the guest cannot do dance: KeyError: 'dance'"):
        await agent.call("dance")
    with pytest.raises(AgentError, match=r"the guest cannot do x+"):
        await agent.call("x" * 10_000)
    with pytest.raises(AgentError, match="the guest cannot do identify: KeyError: 'seed'"):
        await agent.call("identify")
    with pytest.raises(AgentError, match="the guest cannot do identify: ValueError"):
        await agent.call("identify", seed="no hexadecimal")


# Connections


async def test_a_new_host_finds_nothing_of_the_last_one(real: RealAgent) -> None:
    async with real.connect() as first, first.open_process("sleep", "60"), first.open_process("yes"):
        await until(lambda: len(real.children()) == 2)
    async with real.connect(adopted=True) as second:
        await until(lambda: not real.children())
        assert await second.run(SH, "-c", "echo hello") == (0, b"hello\n")


@pytest.mark.parametrize("kind", [b"I", b"R", b"K", b"C", b"W", b"X", b"H"])
@pytest.mark.parametrize("cut", [3, HEAD, HEAD + 1, HEAD + 999])
async def test_a_host_that_is_killed_in_the_middle_of_a_frame(real: RealAgent, kind: bytes, cut: int) -> None:
    cat = json.dumps({"program": "cat", "arguments": []}).encode()
    async with await trio.open_unix_socket(str(real.path)) as first:
        await first.send_all(Hello().question(after_loss=True) + encode(b"R", 1, cat) + encode(kind, 1, b"1" * 1000)[:cut])
    async with real.connect(adopted=True) as second:
        assert await second.run(SH, "-c", "echo hello") == (0, b"hello\n")
    await until(lambda: not real.children())


async def test_a_host_that_comes_while_output_is_under_way(real: RealAgent) -> None:
    for _ in range(5):
        async with real.connect(adopted=True) as agent, agent.open_process("yes") as process:
            await process.receive()


async def test_garbage_before_the_hello(real: RealAgent) -> None:
    async with await trio.open_unix_socket(str(real.path)) as stream:
        await stream.send_all(os.urandom(100_000) + b"offload-agent " + b"I" * 50)
    async with real.connect(adopted=True) as agent:
        assert (await agent.run("true"))[0] == 0


async def test_an_agent_that_is_killed(real: RealAgent) -> None:
    """The host is told, whatever it was waiting for, and the next connection is as good as the first."""
    async with real.connect() as agent, agent.open_process("yes") as process:
        for _ in range(10):
            await process.receive()
        real.kill()
        real.start_again()
        with pytest.raises(AgentError, match="the agent ended, and was started again"):
            while await process.receive():
                pass
        await agent.wait_lost()
        with pytest.raises(AgentError, match="was started again"):
            await agent.call("clock")
    async with real.connect(adopted=True) as agent:
        assert (await agent.run("true"))[0] == 0


async def test_an_agent_that_is_killed_while_it_gets_input(real: RealAgent) -> None:
    async with real.connect() as agent, agent.open_process("cat") as process:
        with trio.move_on_after(0.2):
            await process.send(bytes(4 * WINDOW))
        real.kill()
        real.start_again()
        with pytest.raises(AgentError, match="was started again"):
            await process.wait()
    async with real.connect(adopted=True) as agent:
        assert (await agent.run("true"))[0] == 0


# Trees


def make_tree(folder: Path) -> dict[str, bytes]:
    files = {f"d{number % 7}/file {number}": os.urandom(number * 13 % 3000) for number in range(300)}
    files |= {"big": os.urandom(5_000_000), "d0/é": b"", "x" * 200: b"long"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "d1/run").write_bytes(b"#!/bin/sh\n")
    (folder / "d1/run").chmod(0o755)
    (folder / "link").symlink_to("d1/run")
    os.utime(folder / "d1/run", (4_000_000_000, 4_000_000_000))  # in the future
    return files | {"d1/run": b"#!/bin/sh\n"}


async def in_pieces(path: Path, size: int = 100_000) -> AsyncIterator[bytes]:
    async with await trio.open_file(path, "rb") as file:
        while piece := await file.read(size):
            yield piece


async def test_a_tree_there_and_back(agent: Agent, tmp_path: Path) -> None:
    sent, there, back = (tmp_path / name for name in ("sent", "there", "back"))
    files = make_tree(sent)
    there.mkdir()
    with tarfile.open(tmp_path / "sent.tar", "w") as tar:
        tar.add(sent, ".")

    await agent.put(in_pieces(tmp_path / "sent.tar"), str(there))
    with open_outputs_receiver(tmp_path / "back.tar") as receiver:
        async with agent.get(str(there)) as pieces:
            async for piece in pieces:
                receiver.write(piece)
    await trio.to_thread.run_sync(unpack_outputs, tmp_path / "back.tar", back)

    for folder in (there, back):
        assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == (
            files | {"link": b"#!/bin/sh\n"}
        )
        assert (folder / "link").readlink() == Path("d1/run")
        assert (folder / "d1/run").stat().st_mode & 0o777 == 0o755
        assert (folder / "d1/run").stat().st_mtime == 4_000_000_000


async def test_a_tree_that_cannot_be_put(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "sent.tar").write_bytes(os.urandom(3_000_000))
    with pytest.raises(AgentError, match="cannot be put into the guest: tar ended with status 2") as caught:
        await agent.put(in_pieces(tmp_path / "sent.tar"), str(tmp_path))
    assert "does not look like a tar archive" in caught.value.detail
    with tarfile.open(tmp_path / "sent.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    with pytest.raises(AgentError, match="cannot be put into the guest") as caught:
        await agent.put(in_pieces(tmp_path / "sent.tar"), str(tmp_path / "missing"))
    assert "No such file or directory" in caught.value.detail


async def test_a_tree_that_cannot_be_taken(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="cannot be taken from the guest: tar ended") as caught:
        async with agent.get(str(tmp_path / "missing")) as pieces:
            async for _ in pieces:
                pass
    assert "No such file or directory" in caught.value.detail


async def test_taking_a_tree_can_be_given_up(agent: Agent, real: RealAgent, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(20_000_000))
    async with agent.get(str(tmp_path)) as pieces:
        async for piece in pieces:
            assert piece
            break
    await until(lambda: not real.children())


async def test_a_link_of_a_tree_leads_nowhere(agent: Agent, tmp_path: Path) -> None:
    """What the guest sends is unpacked by the checks that outputs have."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/out").symlink_to("/etc/passwd")
    with open_outputs_receiver(tmp_path / "back.tar") as receiver:
        async with agent.get(str(tmp_path / "there")) as pieces:
            async for piece in pieces:
                receiver.write(piece)
    unpacked = unpack_outputs(tmp_path / "back.tar", tmp_path / "back")
    assert unpacked.left_out == ("out -> /etc/passwd",)


async def test_a_source_that_fails_ends_the_put(agent: Agent, real: RealAgent, tmp_path: Path) -> None:
    async def failing() -> AsyncIterator[bytes]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("half"), io.BytesIO())
        yield buffer.getvalue()[:700]
        raise AgentError("the other guest is gone")

    with pytest.raises(AgentError, match="the other guest is gone"):
        await agent.put(failing(), str(tmp_path))
    await until(lambda: not real.children())


# Secrets


async def deliver(agent: Agent, root: Path, target: Path) -> int:
    async with agent.open_process("secrets", str(target)) as process:
        stream = ProcessStream(process)
        assert await receive_hello(stream)
        await send_secrets(stream, read_secret_root(root))
        return await process.wait()


async def test_secrets_over_the_channel(agent: Agent, tmp_path: Path) -> None:
    root, target = tmp_path / "root", tmp_path / "target"
    target.mkdir()
    (root / "etc/ssh").mkdir(parents=True)
    (root / "etc/ssh/key").write_text("private\n")
    (root / "etc/ssh/key").chmod(0o600)
    (root / "large").write_bytes(os.urandom(2_000_000))
    assert await deliver(agent, root, target) == 0
    assert (target / "etc/ssh/key").read_text() == "private\n"
    assert (target / "etc/ssh/key").stat().st_mode == 0o100600
    assert (target / "large").read_bytes() == (root / "large").read_bytes()


async def test_secrets_that_are_cut_off(agent: Agent, tmp_path: Path) -> None:
    async with agent.open_process("secrets", str(tmp_path)) as process:
        assert await receive_hello(ProcessStream(process))
        await process.send(b'(secrets (version 0) (files (("/key" 100 33152))))half')
        await process.send_eof()
        assert await process.receive() == b""
        assert await process.receive_error() == b"secret-service: refused: the files are cut off: 96 bytes are missing\n"
        assert await process.wait() == 1
    assert list(tmp_path.iterdir()) == []


# Builds


STARTED = encode_build(b"E", b'{"event": "started", "clock": 5.0, "cpu": "c"}')
FAILED = encode_build(b"E", b'{"event": "exit", "status": 2, "step": 1, "clock": 6.0}')


class Quiet:
    """A listener that only notes the log."""

    def __init__(self) -> None:
        self.text = ""

    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def collecting(self) -> None: ...

    def log(self, text: str) -> None:
        self.text += text


class Said:
    """A build service that says what is in two files."""

    def __init__(self, agent: Agent, folder: Path) -> None:
        self._agent = agent
        self._folder = folder

    def open_process(self) -> AbstractAsyncContextManager[AgentProcess]:
        return self._agent.open_process(SH, "-c", f"cat {self._folder}/errors >&2; cat {self._folder}/script")


@pytest.mark.parametrize(
    ("script", "errors"),
    [
        (STARTED + encode_build(b"L", b"compiling\n") + FAILED + encode_build(b"D"), b""),
        (STARTED + encode_build(b"L", b"half a build"), b"sudo: oh\n"),
        (b"", b"sudo: a password is required\n"),
        (b"garbage", b""),
        (encode_build(b"E", b'{"event": "error", "what": "no disk"}'), b""),
    ],
)
async def test_the_fake_guest_of_other_tests_is_as_a_real_one(
    agent: Agent, tmp_path: Path, script: bytes, errors: bytes
) -> None:
    """`run_build` comes to the same end with `FakeGuest` and with a program behind the real agent that says the same."""
    source = tmp_path / "source.tar"
    source.write_bytes(b"x" * 200_000)
    (tmp_path / "script").write_bytes(script)
    (tmp_path / "errors").write_bytes(errors)
    job = Job(
        build="b", name="r-1", steps=("make",), env={}, outputs=(), source=source, environment="env-b", set_clock=None,
        expected_clock=lambda: 5.0, timeout_s=60.0, max_silent_s=60.0, keep_failed=False,
    )  # fmt: skip

    async def result(name: str, service: run.BuildService) -> tuple[object, ...]:
        listener = Quiet()
        with open_outputs_receiver(tmp_path / name) as outputs:
            try:
                report = await run.run_build(service, job, outputs, listener)
            except OffloadError as exc:
                return type(exc), exc.what, exc.detail, listener.text
            return report.exit_status, report.failed_step, listener.text

    assert await result("fake", FakeGuest(script, b"", errors=errors)) == await result("real", Said(agent, tmp_path))


async def test_the_build_service_answers_what_is_no_build(agent: Agent) -> None:
    async with agent.open_process("build-service") as process:
        await process.send(encode_build(b"B", json.dumps({"protocol": 0}).encode()) + bytes(MAX_PAYLOAD))
        said = await process.receive()
        assert said.startswith(b"E")
        assert b"error" in said
