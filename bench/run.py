"""`make bench`: how fast we are against the bare tools, in one run (9 minutes with --quick on two cores).

    python bench/run.py [--quick] [--only fresh,builds,routes,image,routing,throughput,compile,slots,offload] [--output FOLDER]

Not a test: what it prints is for people.  Exit status 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from bench.builds import measure_command, measure_own_vm, measure_running
from bench.compiling import measure_compile
from bench.fresh import measure_fresh
from bench.hooks import measure_decision
from bench.images import measure_image
from bench.measure import BenchError, Budget, Row
from bench.offloading import measure_offloading
from bench.report import table, write_report
from bench.routes import measure_binfmt, measure_local
from bench.routing import measure_routing
from bench.slots import measure_slots
from bench.throughput import measure_throughput
from bench.workplace import open_workplace
from offloadd.errors import OffloadError
from offloadd.model.quantity import format_date, format_duration

PARTS = ("fresh", "builds", "routes", "image", "routing", "throughput", "compile", "slots", "offload")


def main() -> int:
    """Measure, write, print; the exit status."""
    options = _parse()
    # So that nothing is left running after SIGTERM either.  trio knows when an interrupt may be raised, and takes SIGINT alone.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    began, load = time.monotonic(), os.getloadavg()[0]
    facts = {"date": format_date(datetime.now(UTC)), "cores": str(os.cpu_count()), "python": platform.python_version()}
    try:
        rows = _measure(options.only, facts, quick=options.quick)
    except KeyboardInterrupt:
        return 130
    facts["load_average"] = f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"
    facts["took"] = format_duration(time.monotonic() - began) + (" (--quick)" if options.quick else "")
    write_report(rows, facts, options.output)
    sys.stdout.write(table(rows))
    return 75 if "failed" in facts else 1 if any(row.met is False for row in rows) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure offload against the bare tools.")
    parser.add_argument("--quick", action="store_true", help="few rounds, small loads: 9 minutes on two cores")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="for results.md and .json")
    return parser.parse_args()


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(PARTS)}")
    return parts


def _measure(parts: tuple[str, ...], facts: dict[str, str], *, quick: bool) -> list[Row]:
    rows: list[Row] = []

    def limit(seconds: float, least: int, most: int) -> Budget:
        return Budget(seconds / 4, least=1, most=least) if quick else Budget(seconds, least=least, most=most)

    failed: list[str] = []

    def collect(part: str, *measures: Callable[[], list[Row]]) -> None:
        """What cannot be measured costs its own rows, and not those of minutes before."""
        for measure in measures if part in parts else ():
            try:
                rows.extend(measure())
            except (BenchError, OffloadError) as exc:
                sys.stderr.write(f"bench: {exc.render() if isinstance(exc, OffloadError) else exc}\n")
                failed.append(part)

    def fresh() -> list[Row]:
        found, about = measure_fresh(place, limit(130, 2, 5), _tell("fresh"))
        facts.update(about)
        return found

    with open_workplace() as place:
        collect("fresh", fresh)
        collect(
            "builds",
            lambda: measure_running(place, limit(30, 3, 10), _tell("builds")),
            lambda: measure_own_vm(place, limit(20, 5, 15), _tell("builds")),
            lambda: measure_command(place, limit(15, 5, 15), _tell("builds")),
        )
        collect("throughput", lambda: measure_throughput(place, limit(60, 1, 2), _tell("throughput"), quick=quick))
        collect("compile", lambda: measure_compile(place, limit(100, 5, 7), _tell("compile")))
        collect("slots", lambda: measure_slots(place, limit(40, 1, 3), _tell("slots")))
        collect(
            "routes",
            lambda: measure_local(place, limit(30, 5, 15), _tell("routes")),
            lambda: measure_binfmt(place, limit(40, 1, 3), _tell("routes")),
        )
        collect(
            "offload",
            lambda: measure_decision(place, limit(5, 5, 20), _tell("offload")),
            lambda: measure_offloading(place, _tell("offload"), quick=quick),
        )
    if "image" in parts:
        with open_workplace(empty_cache=True) as place:
            collect("image", lambda: measure_image(place, limit(90, 1, 3), _tell("image")))
    collect("routing", lambda: measure_routing(limit(15, 5, 15), _tell("routing")))
    if failed:
        facts["failed"] = ", ".join(dict.fromkeys(failed))
    return rows


def _tell(part: str) -> Callable[[str, float | None], None]:
    """Progress as lines; what has a fraction changes too often for that."""

    def tell(text: str, fraction: float | None) -> None:
        if fraction is None:
            sys.stderr.write(f"bench: {part}: {text}\n")

    return tell


if __name__ == "__main__":
    sys.exit(main())
