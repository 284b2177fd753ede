"""How machines look to a person, for `offload machine`.  Pure functions: values in, lines out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from offload_cli.show import ago, fitting_table, moment
from offload_cli.terminal import clean, one_line
from offloadd.model.quantity import format_duration, format_size, parse_date

_WIDTH = 100


def machines_page(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """`offload machine list`: a row for each, and below what is wrong with some.

    Args:
        width: of the terminal; None for as wide as it comes.
    """
    lines = fitting_table([_cells(row) for row in rows], width, ("SPEED", "DISK", "LOAD", "KIND"))
    notes = [note for row in rows for note in _notes(row, min(width or _WIDTH, _WIDTH))]
    return "\n".join([lines, *([""] if notes else []), *notes])


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    load, disk = row.get("load"), row.get("disk_free")
    return {
        "NAME": str(row["name"]),
        "KIND": str(row["kind"]),
        "SYSTEMS": systems_text([name for name in row["systems"] if name not in row["missing"]]),
        "MODE": str(row["mode"]),
        "STATE": state_text(row),
        "SLOTS": f"{row['busy']}/{row['slots']}",
        "SPEED": f"{row['speed']:g}",
        "LOAD": "-" if load is None else f"{load:.2f}",
        "DISK": "-" if disk is None else format_size(disk),
    }


def systems_text(systems: Sequence[str]) -> str:
    """The first system type, and how many more."""
    if not systems:
        return "-"
    return systems[0] if len(systems) == 1 else f"{systems[0]} +{len(systems) - 1}"


def state_text(row: Mapping[str, Any]) -> str:
    """What keeps it from building, else what it is doing."""
    if row["fault"]:
        return "unusable"
    if row["breaker"]["state"] != "closed":
        return f"breaker {row['breaker']['state']}"
    if row["systems"] and all(name in row["missing"] for name in row["systems"]):
        return "unusable"
    if row.get("state"):
        return str(row["state"])
    # Nobody asks a host that is to be left alone.
    return "-" if row["mode"] == "offline" else "ready"


def breaker_text(breaker: Mapping[str, Any]) -> str:
    """`open until 12:03 (3 failures)`, in the user's own time; empty while it is closed and nothing has failed."""
    failures = breaker["failures"]
    words = f"({failures} {'failure' if failures == 1 else 'failures'})"
    match breaker["state"]:
        case "open":
            until = datetime.fromtimestamp(breaker["open_until"]).astimezone()
            return f"open until {until:%H:%M} {words}"
        case "half-open":
            return f"half-open: tried with one build {words}"
    return f"closed {words}" if failures else ""


def _notes(row: Mapping[str, Any], width: int) -> Iterable[str]:
    """What is wrong, each in a line that begins with the machine's name."""
    texts = [": ".join(filter(None, (row["fault"], row["remedy"])))] if row["fault"] else _missing_texts(row["missing"])
    if row["breaker"]["state"] != "closed":
        texts = [f"breaker {breaker_text(row['breaker'])}: offload machine resume {row['name']}", *texts]
    for text in texts:
        yield from textwrap.wrap(f"{row['name']}: {one_line(str(text))}", width, subsequent_indent="  ", **_UNBROKEN)


_UNBROKEN: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _missing_texts(missing: Mapping[str, str]) -> list[str]:
    """A line for each, or one for all when there are many of a kind: what nobody has asked for is not told at length."""
    if len(missing) <= 1:
        return [f"not {system}: {why}" for system, why in missing.items()]
    return [f"not {', '.join(missing)} (offload machine show says why)"]


def machine_page(machine: Mapping[str, Any], now: float) -> str:
    """`offload machine show`: YAML-like; the description is the machine's file as it was understood."""
    known = [
        ("kind", str(machine["kind"])),
        ("mode", str(machine["mode"])),
        ("state", _state_line(machine, now)),
        ("wrong", str(machine["fault"])),
        ("to do", str(machine["remedy"])),
        ("breaker", breaker_text(machine["breaker"])),
        ("systems", ", ".join(name for name in machine["systems"] if name not in machine["missing"]) or "none now"),
        ("slots", f"{machine['busy']} of {machine['slots']} busy"),
        ("emulation", {"none": "none", "user": "user (qemu-user)", "full": "full (a whole machine)"}[machine["emulation"]]),
        ("load", _load_line(machine)),
        ("memory", format_size(machine["memory_mib"] << 20) if machine.get("memory_mib") else ""),
        ("free disk", format_size(machine["disk_free"]) if machine.get("disk_free") is not None else ""),
        ("kernel", str(machine.get("kernel") or "")),
        ("SSH", f"127.0.0.1:{machine['ssh_port']}" if machine.get("ssh_port") else ""),
    ]
    lines = [str(machine["name"])]
    lines += [line for name, value in known if value for line in _field(name, value)]
    if machine["missing"]:
        lines.append("  not now:")
        lines += [line for name, why in machine["missing"].items() for line in _field(name, why, "    ")]
    lines.append("  description:")
    lines += _configuration_lines(machine.get("configuration", {}))
    return clean("\n".join(lines))


def _field(name: str, value: str, indent: str = "  ") -> list[str]:
    text = f"{indent}{name}: {one_line(value, 1000)}"
    return textwrap.wrap(text, _WIDTH, subsequent_indent=f"{indent}  ", **_UNBROKEN)


def _state_line(machine: Mapping[str, Any], now: float) -> str:
    state = state_text(machine)
    if machine.get("state"):
        since = f" since {moment(machine['since'])} ({ago(machine['since'], now)})" if machine.get("since") else ""
        state = f"{machine['state']}{since}"
    reason = machine.get("reason")
    return f"{state}: {reason}" if reason else state


def _load_line(machine: Mapping[str, Any]) -> str:
    load, threshold = machine.get("load"), machine.get("overload_threshold")
    if load is None:
        return ""
    over = " (overloaded: taken last)" if threshold is not None and load > threshold else ""
    return f"{load:.2f} for each core{over}"


def _configuration_lines(values: Mapping[str, Any]) -> list[str]:
    kept = {name: value for name, value in values.items() if value not in (None, [], {}) and name not in ("name", "kind")}
    return [f"    {name}: {_plain(value)}" for name, value in kept.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_plain(item)}' for name, item in value.items())}}}"
    return value if isinstance(value, str) else json.dumps(value)


def check_lines(check: Mapping[str, Any]) -> list[str]:
    """One check of `offload machine test`; what a failed one said stands below it."""
    word = "ok" if check["ok"] else "failed"
    took = f" ({format_duration(check['took_s'])})" if check["took_s"] >= 0.05 else ""
    lines = [f"  {word:<6}  {check['name']}: {one_line(str(check['text']), 300)}{took}"]
    if not check["ok"]:
        lines += [f"          | {line}" for line in clean(str(check["detail"])).rstrip().splitlines()]
        lines += [f"          hint: {one_line(str(check['hint']), 300)}"] if check["hint"] else []
    return lines


def templates_page(rows: Sequence[Mapping[str, Any]], now: float, width: int | None = None) -> str:
    """`offload template list`: a row for each, and below why some are of no use any more; `width` as for `machines_page`."""

    def row(template: Mapping[str, Any]) -> dict[str, str]:
        return {
            "DIGEST": str(template["digest"])[:12],
            "MACHINE": str(template["machine"]),
            "IMAGE": str(template["image"]),
            "CPU": str(template["cpu"]),
            "MEMORY": format_size(template["memory_mib"] << 20),
            "QEMU": f"{template['qemu_version']} {str(template['accelerator']).upper()}",
            "MADE": ago(parse_date(template["made"]).timestamp(), now),
            "SIZE": format_size(template["size_on_disk"]),
            "STATE": "stale" if template["stale"] else "in memory" if template["in_memory"] else "on disk",
        }

    lines = fitting_table([row(template) for template in rows], width, ("QEMU", "IMAGE", "MEMORY", "MADE"))
    notes = [f"{template['digest'][:12]}: {one_line(str(template['stale']))}" for template in rows if template["stale"]]
    return "\n".join([lines, *(["", *notes, "offload template gc removes what is stale."] if notes else [])])
