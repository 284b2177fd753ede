"""The states of machines and builds, and the moves between them that are allowed.

A machine (the words after the dash are Ganeti's lesson: who shut it down?):

    stopped -> starting -> running -> stopping -> stopped            by us
                  |           |-----------------> stopped-by-guest   by a user inside the guest
                  |-----------|-----------------> crashed            by nobody's wish

A build:

    created -> queued <-> preparing -> booting -> running -> collecting -> succeeded
       |         |            |           |          |           |-------> failed, timed-out, cancelled, errored

    queued is also waiting for a slot; what fails on one machine goes back to preparing, for the next one.
    From there to itself: on another machine.
"""

from __future__ import annotations

from enum import StrEnum


class MachineState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED_BY_GUEST = "stopped-by-guest"
    CRASHED = "crashed"


_M = MachineState
MACHINE_MOVES: dict[MachineState, frozenset[MachineState]] = {
    _M.STOPPED: frozenset({_M.STARTING}),
    _M.STARTING: frozenset({_M.RUNNING, _M.STOPPING, _M.STOPPED, _M.STOPPED_BY_GUEST, _M.CRASHED}),
    _M.RUNNING: frozenset({_M.STOPPING, _M.STOPPED_BY_GUEST, _M.CRASHED}),
    _M.STOPPING: frozenset({_M.STOPPED, _M.CRASHED}),
    _M.STOPPED_BY_GUEST: frozenset({_M.STARTING}),
    _M.CRASHED: frozenset({_M.STARTING}),
}


class MachineMode(StrEnum):
    """What its owner lets a machine do (Ganeti's words for a node)."""

    ONLINE = "online"
    DRAINED = "drained"
    """Finishes what it has, takes nothing new."""
    OFFLINE = "offline"
    """Is not even talked to."""


class BuildState(StrEnum):
    CREATED = "created"
    QUEUED = "queued"
    PREPARING = "preparing"
    BOOTING = "booting"
    RUNNING = "running"
    COLLECTING = "collecting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    ERRORED = "errored"
    """Not the build's own doing: a boot, a lost machine, a full disk."""

    @property
    def final(self) -> bool:
        return not BUILD_MOVES[self]


_B = BuildState
_ENDS = frozenset({_B.FAILED, _B.TIMED_OUT, _B.CANCELLED, _B.ERRORED})
BUILD_MOVES: dict[BuildState, frozenset[BuildState]] = {
    _B.CREATED: _ENDS | {_B.QUEUED},
    _B.QUEUED: _ENDS | {_B.QUEUED, _B.PREPARING},
    _B.PREPARING: _ENDS | {_B.QUEUED, _B.PREPARING, _B.BOOTING, _B.RUNNING},
    _B.BOOTING: _ENDS | {_B.PREPARING, _B.RUNNING},
    _B.RUNNING: _ENDS | {_B.PREPARING, _B.COLLECTING},
    _B.COLLECTING: _ENDS | {_B.PREPARING, _B.SUCCEEDED},
    **{end: frozenset() for end in (_B.SUCCEEDED, *_ENDS)},
}
