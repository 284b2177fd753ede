"""The bridge to a real asyncio loop in its thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio

from offloadd.bridge import Bridge, open_bridge


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    async with open_bridge() as opened:
        yield opened


async def add(one: int, two: int) -> int:
    await asyncio.sleep(0)
    return one + two


async def test_results_and_errors_come_back(bridge: Bridge) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("why")

    assert await bridge.call(add, 1, 2) == 3
    with pytest.raises(KeyError, match="why"):
        await bridge.call(fail)
    assert await bridge.run_sync(threading.get_ident) != threading.get_ident()


async def test_calls_run_side_by_side(bridge: Bridge) -> None:
    opened = await bridge.run_sync(asyncio.Event)

    async def set_it() -> None:
        opened.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bridge.call, opened.wait)
            nursery.start_soon(bridge.call, set_it)


async def test_a_cancellation_waits_until_the_task_has_cleaned_up(bridge: Bridge) -> None:
    said: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            said.append("cleaned up")

    with trio.move_on_after(0.05) as scope:
        await bridge.call(slow)
    assert scope.cancelled_caught
    assert said == ["cleaned up"]


async def test_a_result_that_was_faster_than_the_cancellation_is_not_lost(bridge: Bridge) -> None:
    async def connect() -> str:
        # As a library does that was connected in this very moment.
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "a connection that somebody must close"

    with trio.move_on_after(0.05):
        assert await bridge.call(connect) == "a connection that somebody must close"
        return
    pytest.fail("the result was lost")


async def test_an_error_while_it_is_cancelled_does_not_hide_the_cancellation(bridge: Bridge) -> None:
    async def fail() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise OSError("broken") from None

    with trio.move_on_after(0.05) as scope:
        await bridge.call(fail)
    assert scope.cancelled_caught


async def test_a_call_in_a_scope_that_is_cancelled_already(bridge: Bridge) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await bridge.call(asyncio.sleep, 60)
    assert scope.cancelled_caught


async def test_a_task_that_is_cancelled_from_its_own_side_is_an_error_of_the_program(bridge: Bridge) -> None:
    async def cancel_itself() -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="own side"):
        await bridge.call(cancel_itself)


async def test_the_thread_ends_with_the_block() -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "offload-asyncio"]

    before = len(threads())
    with pytest.raises(ValueError, match="the block's own"):
        async with open_bridge() as bridge:
            await bridge.call(add, 1, 2)
            assert len(threads()) == before + 1
            raise ValueError("the block's own")
    assert len(threads()) == before
