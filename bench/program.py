"""Programs that are timed beside our own work: none of their processes is left, whatever happens."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import which

import trio

from bench.measure import BenchError
from offloadd.errors import OffloadError
from offloadd.process import program_environment, run_program


async def time_to_end(argv: Sequence[str], *, limit_s: float, env: Mapping[str, str] | None = None) -> float:
    """Seconds from the start of a program to its end.

    Raises:
        BenchError: it is missing, fails or takes too long; with the end of what it said.
    """
    began = trio.current_time()
    await _run(argv, limit_s, env, None)
    return trio.current_time() - began


async def time_to_lines(
    argv: Sequence[str],
    patterns: Sequence[re.Pattern[str]],
    *,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    heard: list[str] | None = None,
) -> list[float]:
    """Seconds from the start of a program to each of its lines that match, in their order; then it is ended.

    Args:
        heard: gets these lines.
    Raises:
        BenchError: it is missing, ends before, or takes too long.
    """
    began, times = trio.current_time(), list[float]()
    last = ""

    class Enough(Exception):
        """All lines have come."""

    def take(line: str) -> None:
        nonlocal last
        last = line.strip() or last
        if patterns[len(times)].search(line):
            times.append(trio.current_time() - began)
            if heard is not None:
                heard.append(line)
            if len(times) == len(patterns):
                raise Enough

    try:
        await _run(argv, limit_s, env, take)
    except Enough:
        return times
    raise BenchError(f"{argv[0]} ended without {patterns[len(times)].pattern!r}; its last line: {last[:200]}")


def find_program(name: str, hint: str) -> str:
    """Its path: beside this interpreter, or where the system has programs.

    Raises:
        BenchError: it is not installed; with the hint.
    """
    own = Path(sys.executable).with_name(name)
    if own.exists():
        return str(own)
    found = which(name, path=program_environment()["PATH"])
    if found is None:
        raise BenchError(f"not installed: {hint}")
    return found


async def _run(
    argv: Sequence[str], limit_s: float, env: Mapping[str, str] | None, on_line: Callable[[str], None] | None
) -> None:
    try:
        with trio.fail_after(limit_s):
            await run_program(argv, on_line=on_line, env=env)
    except trio.TooSlowError as exc:
        raise BenchError(f"{Path(argv[0]).name} took longer than {limit_s:.0f} s") from exc
    except OffloadError as exc:
        raise BenchError(exc.render()) from exc
