"""A guest without Python, looked at: with a shell and the basic utilities, as a childhurd has them.

What it says is as little trusted as what `offloadd.place.probe` reads.  What it does not know stays unknown: GNU/Hurd shows
less of itself than Linux does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from offloadd.errors import ProtocolError
from offloadd.place.probe import MAX_ANSWER, MAX_TIME, Probe, Shell, ask_shell, send_and_get_back
from offloadd.vm.console import clean

_MARK = "== "
"""Before the name of what the next lines are."""

# Each by itself may be missing there; `date` is the last, as what comes before it takes a moment.
_LOOK = f"""\
LC_ALL=C; export LC_ALL
echo '{_MARK}load'; cat /proc/loadavg 2>/dev/null || uptime 2>/dev/null
echo '{_MARK}cores'; nproc 2>/dev/null
echo '{_MARK}memory'; cat /proc/meminfo 2>/dev/null
echo '{_MARK}disk'; df -Pk "$HOME" 2>/dev/null || df -Pk / 2>/dev/null
echo '{_MARK}kernel'; uname -sr
echo '{_MARK}machine'; uname -m
echo '{_MARK}time'; date +%s
exit 0
"""
_EXCHANGE = """\
umask 077; f=$HOME/.offload-exchange-$$
head -c {size} > "$f" && cat "$f"; s=$?; rm -f "$f"; exit $s
"""
# Linux's and the Hurd's /proc/loadavg begin with it; `uptime` ends with three.
_LOADAVG = re.compile(r"(\d{1,6}\.\d{1,6}) ")
_UPTIME = re.compile(r"load averages?: (\d{1,6}\.\d{1,6})")
# The Hurd tells what is free, not what could be.
_MEMORY = (re.compile(r"^MemAvailable: +(\d{1,15}) kB", re.MULTILINE), re.compile(r"^MemFree: +(\d{1,15}) kB", re.MULTILINE))
# POSIX: file system, blocks, used, available, capacity, mounted on; the Hurd's root is called `-`.
_DISK = re.compile(r"^\S.* (\d{1,18}) +\d{1,3}% +/", re.MULTILINE)


async def probe_plain(shell: Shell, machine: str, clock: Callable[[], float] = time.time) -> Probe:
    """Look at the guest that `shell` is a login on.

    Args:
        machine: its name, for errors.
        clock: what its clock should show.
    Raises:
        SshError: it does not run these commands, or the connection broke.
        ProtocolError: it does not say what time it is.
    """
    said = await ask_shell(shell, _LOOK, machine)
    return parse_plain(said, clock(), machine)


def parse_plain(said: bytes, received: float, machine: str) -> Probe:
    """What the commands printed, checked.

    Args:
        received: what its clock should have shown at that moment.
    Raises:
        ProtocolError: it does not say what time it is.
    """
    parts = _parts(said[:MAX_ANSWER].decode(errors="replace"))
    moment = _number(parts, "time", MAX_TIME)
    if moment is None:
        raise ProtocolError("does not know what time it is", subject=machine)
    cores = max(_number(parts, "cores", 1 << 20) or 1, 1)
    load, text = None, parts.get("load", "")
    if match := _LOADAVG.match(text) or _UPTIME.search(text):
        load = round(float(match[1]) / cores, 4)
    memory = next((int(match[1]) for match in (kind.search(parts.get("memory", "")) for kind in _MEMORY) if match), None)
    disk = _DISK.search(parts.get("disk", ""))
    return Probe(
        # Whole seconds are half a second late on average.
        clock_offset_s=round(moment + 0.5 - received, 3),
        load=load,
        cores=cores,
        memory_mib=None if memory is None else memory >> 10,
        disk_free=int(disk[1]) << 10 if disk else None,
        kernel=_words(parts.get("kernel", "")),
        machine=_words(parts.get("machine", "")),
    )


def _parts(text: str) -> dict[str, str]:
    """Name -> the lines after its mark; the first of a name counts."""
    parts: dict[str, str] = {}
    for part in f"\n{text}".split(f"\n{_MARK}")[1:]:
        name, _, lines = part.partition("\n")
        parts.setdefault(name.strip(), lines)
    return parts


def _number(parts: dict[str, str], name: str, most: int) -> int | None:
    text = parts.get(name, "").strip()
    fits = text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most
    return int(text) if fits else None


def _words(text: str) -> str:
    return " ".join(clean(text[:200]).split())


async def exchange_plain(shell: Shell, machine: str, size: int) -> float:
    """Send a file of random bytes there and get it back, as `probe.exchange_file`; the seconds that it took.

    Raises:
        SshError: it cannot be written there, or the connection broke.
        ProtocolError: what came back is something else.
    """
    return await send_and_get_back(shell, _EXCHANGE.format(size=size), machine, size)
