"""One error leaves a narrow nursery as itself."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from offloadd.errors import BootError, SshError
from offloadd.nursery import open_narrow_nursery


async def fail(error: BaseException) -> None:
    raise error


async def test_one_error_leaves_as_itself() -> None:
    error = SshError("broken")
    with pytest.raises(SshError) as caught:
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(fail, error)
            await trio.sleep_forever()
    assert caught.value is error


async def test_an_error_of_the_block_keeps_its_cause() -> None:
    cause = OSError("why")
    with pytest.raises(SshError) as caught:
        async with open_narrow_nursery():
            raise SshError("broken") from cause
    assert caught.value.__cause__ is cause


async def test_a_nested_nursery_is_narrowed_too() -> None:
    with pytest.raises(SshError):
        async with open_narrow_nursery() as outer:
            async with trio.open_nursery() as inner:
                inner.start_soon(fail, SshError("deep"))
            outer.start_soon(trio.sleep_forever)


async def test_of_several_of_ours_the_first_is_told() -> None:
    async def late() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise SshError("a consequence")

    with pytest.raises(BootError, match="the reason"):
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(late)
            await trio.testing.wait_all_tasks_blocked()
            raise BootError("the reason")


async def test_several_that_are_not_ours_stay_a_group() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(fail, ValueError("one"))
            nursery.start_soon(fail, KeyError("two"))
    assert len(caught.value.exceptions) == 2


async def test_a_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
    assert scope.cancelled_caught


async def test_an_error_while_being_cancelled_is_not_hidden_in_a_group() -> None:
    async def break_while_cleaning_up() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise SshError("broke while it was torn down")

    with pytest.raises(SshError), trio.CancelScope() as scope:
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(break_while_cleaning_up)
            nursery.start_soon(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()


async def test_without_an_error_nothing_happens() -> None:
    async with open_narrow_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)
