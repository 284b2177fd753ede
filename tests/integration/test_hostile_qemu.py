"""A monitor that is spoken for by a guest that has broken out of its QEMU: nonsense ends the machine, never the daemon."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from offloadd.bridge import Bridge, open_bridge
from offloadd.errors import MachineLostError
from offloadd.vm import qmp
from offloadd.vm.qmp import Qmp, open_qmp

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
TIME = {"seconds": 1, "microseconds": 1}
Answer = Callable[[dict[str, Any]], bytes]


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\r\n"


async def serve(stream: trio.SocketStream, answer: Answer) -> None:
    """Greet, agree on capabilities, then answer each command as the test wants."""
    await stream.send_all(GREETING)
    waiting, greeted = "", False
    async for data in stream:
        waiting += data.decode()
        while waiting.strip():
            # qemu.qmp puts nothing between its commands.
            command, end = json.JSONDecoder().raw_decode(waiting.lstrip())
            waiting = waiting.lstrip()[end:]
            await stream.send_all(answer(command) if greeted else line({"return": {}}))
            greeted = True


@asynccontextmanager
async def monitor(folder: Path, bridge: Bridge, answer: Answer) -> AsyncIterator[Qmp]:
    async def handler(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # we have hung up
            await serve(stream, answer)

    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(str(folder / "qmp"))
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(listener)])
            async with open_qmp(bridge, folder / "qmp", "m") as opened:
                yield opened
            nursery.cancel_scope.cancel()


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    async with open_bridge() as opened:
        yield opened


@pytest.mark.parametrize(
    "said",
    [
        b" " * (11 << 20) + b"\n",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        b'{"a":"\xff"}\n',
        b'{"a":' + b"1" * 5000 + b"}\n",
        b"[]\n",
        line({"event": [], "timestamp": 1}),
        line({"error": 1}),
    ],
    ids=["long", "deep", "no text", "a large number", "a list", "an odd event", "an odd error"],
)
async def test_lines_that_are_no_answers(said: bytes, bridge: Bridge, tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with monitor(tmp_path, bridge, lambda command: said) as qemu:
            with pytest.raises(MachineLostError):
                await qemu.execute("cont")


@pytest.mark.parametrize("value", [{}, [1], None, {"fdset-id": "x"}, {"fdset-id": []}])
async def test_a_descriptor_that_is_not_taken(value: object, bridge: Bridge, tmp_path: Path) -> None:
    async with monitor(tmp_path, bridge, lambda command: line({"return": value, "id": command["id"]})) as qemu:
        with trio.fail_after(20), (tmp_path / "qmp.txt").open("w") as file, pytest.raises(MachineLostError):
            async with qemu.handed_over(file.fileno()):
                pass


async def test_an_event_without_what_belongs_to_it(bridge: Bridge, tmp_path: Path) -> None:
    odd = line({"event": "BLOCK_IO_ERROR", "timestamp": TIME})
    async with monitor(tmp_path, bridge, lambda command: odd + line({"return": {}, "id": command["id"]})) as qemu:
        with trio.fail_after(20), pytest.raises(MachineLostError):
            await qemu.wait_disk_full()


async def test_events_without_end_are_not_kept(bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "LAST_WORDS_S", 0.2)
    events = line({"event": "SHUTDOWN", "data": {}, "timestamp": TIME}) * 500
    async with monitor(tmp_path, bridge, lambda command: events + line({"return": {}, "id": command["id"]})) as qemu:
        with trio.fail_after(20):
            await qemu.execute("cont")
        assert len(await qemu.take_last_events()) == 100


async def test_a_qemu_that_does_not_answer(bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "ANSWER_S", 0.2)
    async with monitor(tmp_path, bridge, lambda command: b"") as qemu:
        with trio.fail_after(20), pytest.raises(MachineLostError):
            await qemu.execute("cont")
