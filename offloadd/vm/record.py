"""What is written about a running instance, so that the next daemon finds it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from offloadd.model.machine import OLD_SSH_PORT, SSH_PORT
from offloadd.plan.machine import VmPlan
from offloadd.vm.process import QemuProcess

Purpose = Literal["machine", "build", "warm"]


@dataclass(frozen=True, kw_only=True)
class InstanceRecord:
    """One running instance: the process is named by its number and the tick in which it began."""

    plan: VmPlan
    pid: int
    started: int
    ports: dict[int, int]
    """Guest port -> host port, as QEMU has them."""
    cores: tuple[int, ...]
    """The host core of each virtual CPU."""
    missing_features: tuple[str, ...]
    """CPU features of the model that the accelerator does not give."""
    purpose: Purpose
    """Started for its user; for one build, and thrown away after it; or it waits, paused, for a build that takes it."""
    clock_offset: float
    """What the guest's clock is ahead of the host's CLOCK_MONOTONIC, by which QEMU runs it: nobody sets that one, and it stands
    still while the host is suspended."""
    began: float
    """Unix time at which the guest was let go; 0 before that."""

    @property
    def ssh_port(self) -> int | None:
        """The host's port that leads to the guest's sshd; None where none does."""
        return self.ports.get(SSH_PORT, self.ports.get(OLD_SSH_PORT))

    def clock(self) -> float:
        """What the guest's clock should show now, in seconds since 1970."""
        return self.clock_offset + time.monotonic()

    @classmethod
    def of_paused(cls, plan: VmPlan, process: QemuProcess, cores: Sequence[int], purpose: Purpose) -> InstanceRecord:
        """The record of a QEMU of which no more is known than that it was started."""
        return cls(
            plan=plan,
            pid=process.pid,
            started=process.started or 0,
            ports={guest: host for host, guest in plan.forwards if host},
            cores=tuple(cores),
            missing_features=(),
            purpose=purpose,
            clock_offset=0.0,
            began=0.0,
        )


_adapter = TypeAdapter(InstanceRecord)


def write_record(path: Path, record: InstanceRecord) -> None:
    """Written aside and moved into place: a reader never sees half of it."""
    new = path.with_suffix(".new")
    new.write_bytes(_adapter.dump_json(record))
    new.replace(path)


def read_record(path: Path) -> InstanceRecord | None:
    """None when there is no readable record: its instance never got as far as running."""
    try:
        return _adapter.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def read_records(instances: Path) -> list[InstanceRecord]:
    """The records of all instances that have one."""
    found = (read_record(path) for path in sorted(instances.glob("*/instance.json")))
    return [record for record in found if record is not None]
