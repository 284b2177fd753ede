"""The one bridge to asyncio.

asyncssh and qemu.qmp are asyncio libraries; everything else here is trio.  An event loop runs in a thread of its own, and
`await bridge.call(function, *args)` runs a coroutine function there.  trio-asyncio would avoid the thread, but does not import
on Python 3.14.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar, TypeVarTuple

import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Bridge:
    """Calls from trio into the asyncio thread.  Made by `open_bridge` alone."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal

    async def call(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Run `function(*args)` in the asyncio loop and return its result.

        A cancellation on trio's side cancels the asyncio task and waits for it to end, so that nothing of it is left.
        """
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        running: list[asyncio.Task[Any]] = []

        async def run() -> T:
            task = asyncio.current_task()
            assert task is not None
            running.append(task)
            return await function(*args)

        def cancel() -> None:
            # It was started before us, and the loop keeps that order.
            running[0].cancel()

        future: Future[T] = self._portal.start_task_soon(run)

        def wake(_: Future[T]) -> None:
            with suppress(trio.RunFinishedError):  # the result has nobody left to go to
                token.run_sync_soon(done.set)

        future.add_done_callback(wake)
        try:
            await done.wait()
        except trio.Cancelled:
            # Not `future.cancel()`: that ends the future at once, while its task still cleans up or already has its result.
            self._portal.start_task_soon(cancel)
            with trio.CancelScope(shield=True):
                await done.wait()
            if not future.cancelled() and future.exception() is None:
                return future.result()  # it was faster than the cancellation: its result must not be lost
            raise
        try:
            return future.result()
        except FutureCancelled as exc:
            raise RuntimeError("the asyncio task was cancelled from its own side") from exc

    async def run_sync(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a plain function in the asyncio thread."""

        async def call() -> T:
            return function(*args)

        return await self.call(call)


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """One asyncio loop in a thread, for as long as the block lasts."""
    manager = start_blocking_portal(backend="asyncio", name="offload-asyncio")
    portal = await trio.to_thread.run_sync(manager.__enter__)
    try:
        yield Bridge(portal)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(portal.call, portal.stop, True)
            await trio.to_thread.run_sync(manager.__exit__, None, None, None)
