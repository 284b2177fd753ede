"""Work beside the response that tells of it: nothing of it ends the daemon."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from offloadd.daemon.api import _stream_events
from offloadd.daemon.service import Service


async def events(response: Any) -> list[dict[str, Any]]:
    return [json.loads(line) async for line in response.body_iterator]


def service(nursery: trio.Nursery, folder: Path) -> Service:
    return cast(Service, SimpleNamespace(nursery=nursery, workshop=SimpleNamespace(paths=SimpleNamespace(cache=folder))))


async def test_a_client_that_stops_reading_and_goes_away(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:

        async def work(send: Any) -> dict[str, Any]:
            for number in range(200):
                send({"event": "phase", "text": str(number), "fraction": None})
            await trio.lowlevel.checkpoint()
            return {}

        lines = cast(AsyncIterator[bytes], _stream_events(service(nursery, tmp_path), work).body_iterator)
        assert json.loads(await anext(lines))["text"] == "0"
        # The work has ended, and would tell of it.
        await trio.testing.wait_all_tasks_blocked()
        await lines.aclose()  # type: ignore[attr-defined]
    # Otherwise the nursery would have failed, and all machines and builds with it.


async def test_a_mistake_of_ours_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(_: Any) -> dict[str, Any]:
        raise KeyError("never thought of")

    async with trio.open_nursery() as nursery:
        [said] = await events(_stream_events(service(nursery, tmp_path), work))
    assert said["event"] == "error"
    assert "an error of offload itself" in said["what"]
