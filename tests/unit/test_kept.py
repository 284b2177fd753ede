"""The beginning of a file that two fetch, and the disk that two would write to."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

import pytest

from offloadd.builder import kept
from offloadd.errors import HostError
from offloadd.model.childhurd import Childhurd
from offloadd.plan.machine import BootFiles, VmPlan, plan_vm
from offloadd.vm.launch import _open_own
from tests.unit.plans import facts

SHA = hashlib.sha256(b"abc").hexdigest()


def test_a_beginning_that_somebody_has_just_finished_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our opening of it and our lock, the first one moves it to its place."""
    done = tmp_path / "done"
    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        if not done.exists():
            [resumed] = tmp_path.iterdir()
            resumed.write_bytes(b"abc")
            resumed.rename(done)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with kept.open_resumed(tmp_path, "a", SHA, max_bytes=10) as growing:
        growing.read_back()
        growing.restart()
        growing.write(b"abc")
        found = growing.keep("a")
    assert found.read_bytes() == b"abc"
    assert done.read_bytes() == b"abc"


@pytest.fixture
def plan(tmp_path: Path) -> VmPlan:
    (tmp_path / "disk").write_bytes(b"disk")
    machine = Childhurd.model_validate({"kind": "childhurd", "name": "m", "image": "i", "options": []})
    return plan_vm(machine, facts(cpu_models={"qemu64"}), BootFiles(image="i", digest="d", disk=tmp_path / "disk"))


def test_one_disk_has_one_writer(plan: VmPlan) -> None:
    with _open_own(plan), pytest.raises(HostError, match="belongs to another machine"), _open_own(plan):
        pass


def test_what_happens_while_it_is_open_is_told_as_it_is(plan: VmPlan) -> None:
    with pytest.raises(BlockingIOError, match="of QEMU"), _open_own(plan):
        raise BlockingIOError("of QEMU")
