"""What a guest does before it is saved as a template, and a clone before it waits: a build of nothing.

All that every build needs is in the memory of its clones afterwards: programs, libraries, and the build service's own pages.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

import trio

from offloadd.builder.job import Job, Report
from offloadd.builder.outputs import open_outputs_receiver
from offloadd.builder.run import run_build
from offloadd.errors import AgentError
from offloadd.guest.agent import Agent
from offloadd.place.vm import GuestService

_LIMIT_S = 600.0
_LATEST = 1 << 40
"""Seconds since 1970 that a clock may show."""


class _Silent:
    def started(self, report: Report) -> None: ...
    def step(self, index: int, count: int, command: str) -> None: ...
    def log(self, text: str) -> None: ...
    def collecting(self) -> None: ...


async def warm_up(agent: Agent, environment: str | None = None) -> None:
    """Build nothing, in the environment that is mounted there, or in the guest's own system.

    Raises:
        AgentError, ProtocolError: the guest cannot build.
    """
    began = trio.current_time()
    clock = (await agent.call("clock")).get("clock")
    if isinstance(clock, bool) or not isinstance(clock, int | float) or not 0 <= clock < _LATEST:
        raise AgentError(f"its clock shows {repr(clock)[:50]}", subject=agent.machine)
    with tempfile.TemporaryDirectory(prefix="offload-warm-up-") as name:
        folder = Path(name)
        with tarfile.open(folder / "source.tar", "w"):
            pass
        job = Job(
            build="warm-up",
            name="warm-up-0",
            steps=("/bin/true > made",),
            env={},
            outputs=("made",),
            source=folder / "source.tar",
            environment=environment,
            set_clock=None,
            expected_clock=lambda: clock + trio.current_time() - began,
            timeout_s=_LIMIT_S,
            max_silent_s=_LIMIT_S,
            keep_failed=False,
        )
        with open_outputs_receiver(folder / "outputs.tar") as outputs:
            report = await run_build(GuestService(agent), job, outputs, _Silent())
    if report.exit_status:
        raise AgentError(
            f"the guest cannot build: its first build ended with status {report.exit_status}", subject=agent.machine
        )
