"""A nursery that raises one error as itself.

trio turns whatever leaves a nursery into a group.  Our supervisors stop at the first error, so a group of one is unwrapped;
where several of our own errors meet, the first is the one to tell, also when the nursery was being cancelled from outside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from offloadd.errors import OffloadError


@asynccontextmanager
async def open_narrow_nursery() -> AsyncIterator[trio.Nursery]:
    """As `trio.open_nursery`."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error = narrow(group)
        if error is group:
            raise
        # With its own cause, and without the group as context: that says nothing that the error does not.
        raise error from error.__cause__


def narrow(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a group, the first of ours where all are ours, else the group; a cancellation says less than errors."""
    leaves = _leaves(group)
    errors = [leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)] or leaves[:1]
    if len(errors) == 1 or all(isinstance(error, OffloadError) for error in errors):
        return errors[0]
    return group


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
