"""The tables of states."""

from __future__ import annotations

import pytest

from offloadd.model.state import BUILD_MOVES, MACHINE_MOVES, BuildState, MachineState


def test_every_state_has_its_moves() -> None:
    assert set(BUILD_MOVES) == set(BuildState)
    assert set(MACHINE_MOVES) == set(MachineState)


@pytest.mark.parametrize("state", BuildState)
def test_every_build_can_end_and_ends_once(state: BuildState) -> None:
    ends = {BuildState.FAILED, BuildState.TIMED_OUT, BuildState.CANCELLED, BuildState.ERRORED}
    if state.final:
        assert state in ends | {BuildState.SUCCEEDED}
        assert not BUILD_MOVES[state]
    else:
        assert ends <= BUILD_MOVES[state]


def test_only_a_build_whose_outputs_are_collected_succeeds() -> None:
    assert [state for state in BuildState if BuildState.SUCCEEDED in BUILD_MOVES[state]] == [BuildState.COLLECTING]


def reachable(state: MachineState) -> set[MachineState]:
    seen = {state}
    waiting = [state]
    while waiting:
        for after in MACHINE_MOVES[waiting.pop()] - seen:
            seen.add(after)
            waiting.append(after)
    return seen


@pytest.mark.parametrize("state", MachineState)
def test_every_state_of_a_machine_can_be_left_and_reached(state: MachineState) -> None:
    assert reachable(state) == set(MachineState)


@pytest.mark.parametrize("state", [MachineState.STARTING, MachineState.RUNNING, MachineState.STOPPING])
def test_whatever_runs_can_crash(state: MachineState) -> None:
    assert MachineState.CRASHED in MACHINE_MOVES[state]
