"""Seeing that a build hangs: it says nothing, and its processes use no processor time.

User emulation can hang so, above all with threads and signals; a build that waits for something of its own does the same,
and is as lost.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable

import trio

from offloadd.errors import EmulatorFault
from offloadd.model.quantity import format_duration

LEAST_CPU_S = 0.020
"""Processor time, for each minute, of processes that only wait: timers fire, and a scheduler looks."""
_SAMPLES = 10
"""In each limit."""
_LONGEST_PAUSE_S = 15.0
_OWN_PROCESSES = 2
"""The service's front and its worker: the build's own stand below them."""


async def watch_stuck(pid: int, limit_s: float, last_output: Callable[[], float]) -> None:
    """Watch the build service `pid`, until cancelled.

    Args:
        limit_s: how long a build may do nothing.
        last_output: when something came from the build last, on trio's clock.

    Raises:
        EmulatorFault: it hangs.
    """
    alive, used = trio.current_time(), 0.0
    while True:
        await trio.sleep(min(limit_s / _SAMPLES, _LONGEST_PAUSE_S))
        now = trio.current_time()
        cpu = await trio.to_thread.run_sync(processor_time, pid)
        # Less is movement too: that of a process which nobody waited for went with it.
        if cpu is None or abs(cpu - used) > LEAST_CPU_S * max((now - alive) / 60, 1):
            alive, used = now, cpu or 0.0
        idle_s = now - max(alive, last_output())
        if idle_s >= limit_s:
            raise EmulatorFault(f"the emulator hangs: no output and no processor time for {format_duration(idle_s)}")


def processor_time(pid: int) -> float | None:
    """Seconds of processor time that the build below the service `pid` has used so far, with that of its processes that ended.

    None: none of its processes can be seen, because they come and go or the host hides other users' (hidepid, proc(5)).
    """
    used: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):  # noqa: PTH208 - several times a minute, hundreds of names
        if name.isdecimal() and (found := _read_status(name)):
            parent, ticks = found
            used[int(name)] = ticks
            children[parent].append(int(name))
    family, waiting = [], [pid]
    while waiting:
        family.append(waiting.pop())
        waiting += children[family[-1]]
    if len(family) <= _OWN_PROCESSES:
        return None
    return sum(used.get(member, 0) for member in family) / os.sysconf("SC_CLK_TCK")


def _read_status(name: str) -> tuple[int, int] | None:
    """(parent, clock ticks used by it and by those of its children that it has waited for), proc(5); None: it is gone."""
    try:
        with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - hundreds of them at a time
            # The name in parentheses is the process's own choice.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1]), sum(map(int, fields[11:15]))
