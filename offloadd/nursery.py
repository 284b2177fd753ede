"""A nursery that raises one error as itself.

trio turns whatever leaves a nursery into a group.  Our supervisors stop at the first error, so a group of one is unwrapped; where
several of our own errors meet, the first that says more than "cancelled" is the one to tell.
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
        # Without the group as context: it says nothing that the error does not.
        error.__suppress_context__ = True
        raise error


def narrow(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a group, the first of ours where all are ours, else the group itself."""
    leaves = list(_leaves(group))
    if len(leaves) == 1 or all(isinstance(leaf, OffloadError) for leaf in leaves):
        return leaves[0]
    return group


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
