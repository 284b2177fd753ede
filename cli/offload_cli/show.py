"""How things look to a person.  Pure functions: values in, lines out."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_cli.terminal import clean, one_line
from offloadd.model.quantity import format_date, format_duration, format_size, parse_date

if TYPE_CHECKING:
    from offload_cli.result import Result

_ON_PURPOSE_S = 60.0
"""A guest's clock that is further from the host's than this was set so."""
_YEAR_MONTHS = 12
_VALUE_WIDTH = 96
"""Longer values are broken between words; paths never are."""
_DAY_S = 86400
_PACKAGES = 60
_BEFORE_PACKAGES = 56
"""Columns, at most, of an environment's packages, and of what stands before them."""
_GAP = 2
_NARROWEST = 24
"""Columns of a table's last cell that are not worth breaking further."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> str:
    """Columns side by side, as wide as they must be.

    Args:
        width: of the terminal, in whose lines the last column is broken between words; None for as wide as it comes.
    """
    lines = [tuple(heads), *(tuple(one_line(cell) for cell in row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(heads))]
    if width is not None:
        room = max(width - sum(widths[:-1]) - _GAP * (len(widths) - 1), _NARROWEST)
        lines = [part for line in lines for part in _broken(line, room)]
    return "\n".join((" " * _GAP).join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _broken(line: Sequence[str], room: int) -> Iterable[tuple[str, ...]]:
    """The line, its last cell in as many lines as it needs."""
    parts = textwrap.wrap(line[-1], room, break_long_words=False, break_on_hyphens=False) or [""]
    yield (*line[:-1], parts[0])
    yield from ((*[""] * (len(line) - 1), part) for part in parts[1:])


def fitting_table(rows: Sequence[Mapping[str, str]], width: int | None, spared: Sequence[str]) -> str:
    """A table of rows that name their cells.

    Args:
        width: of the terminal; None for as wide as it comes.
        spared: the columns that a narrow terminal goes without, in this order.
    """
    heads = list(rows[0]) if rows else []
    for gone in ("", *spared):
        heads = [head for head in heads if head != gone]
        shown = table(heads, ([row[head] for head in heads] for row in rows))
        if width is None or max(map(len, shown.splitlines())) <= width:
            break
    return shown


def fields(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values in two columns, long values in several lines; pairs without a value are left out."""
    kept = [(name, one_line(value, 2000)) for name, value in pairs if value]
    width = max((len(name) for name, _ in kept), default=0)
    lines = []
    for name, value in kept:
        parts = textwrap.wrap(value, _VALUE_WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"  {label.ljust(width)}  {part}" for label, part in zip_longest([name], parts, fillvalue="")]
    return lines


def moment(seconds: float | None) -> str:
    """A Unix time as a date in UTC; a dash for none."""
    return format_date(datetime.fromtimestamp(seconds, UTC)) if seconds else "-"


def ago(seconds: float | None, now: float) -> str:
    """`3m05s ago`; a dash for never."""
    if not seconds:
        return "-"
    age = max(now - seconds, 0.0)
    return f"{int(age // _DAY_S)}d ago" if age >= 2 * _DAY_S else f"{format_duration(age)} ago"


def shift(clock: datetime, now: datetime) -> str:
    """How far `clock` is from `now`: `-6y10m`, `+3d`, `-2h00m`."""
    sign, early, late = ("-", clock, now) if clock < now else ("+", now, clock)
    months = (late.year - early.year) * _YEAR_MONTHS + late.month - early.month
    if (late.day, late.timetz()) < (early.day, early.timetz()):
        months -= 1
    years, months = divmod(months, _YEAR_MONTHS)
    if years or months:
        return sign + (f"{years}y" if years else "") + (f"{months}m" if months else "")
    seconds = (late - early).total_seconds()
    return sign + (f"{int(seconds // _DAY_S)}d" if seconds >= _DAY_S else format_duration(seconds))


def guest_clock(clock: str, now: float) -> str:
    """`2020-01-01T00:03:12Z, shifted on purpose by -6y10m`."""
    here, there = datetime.fromtimestamp(now, UTC), parse_date(clock)
    if abs((there - here).total_seconds()) < _ON_PURPOSE_S:
        return f"{clock}, as the host's"
    return f"{clock}, shifted on purpose by {shift(there, here)}"


def cpu(model: str, missing: Sequence[str], accelerator: str, *, limit: int | None = None) -> str:
    """A CPU model, and what the accelerator cannot give of it: at most `limit` names."""
    # QEMU's `CPUID.01H:ECX.pcid`: where the bit stands is in the JSON.
    names = [feature.rsplit(".", 1)[-1] for feature in missing]
    if not names:
        return model
    more = f" and {len(names) - limit} more" if limit is not None and len(names) > limit else ""
    return f"{model}; {accelerator.upper()} does not give it {', '.join(names[:limit])}{more}"


def pinning(cores: Sequence[int]) -> str:
    """`vCPU 0 -> core 1, vCPU 1 -> core 0`."""
    return ", ".join(f"vCPU {index} -> core {core}" for index, core in enumerate(cores))


def build_summary(state: str, result: Mapping[str, Any], kept: Result | None) -> list[str]:
    """How a build went: on what it ran, at which date, where its outputs are."""
    name = f"{result.get('name', 'build')} {result.get('version', '')}".strip()
    duration = result.get("duration_s")
    first = f"{name}: {state}" + (f" in {format_duration(duration)}" if isinstance(duration, (int, float)) else "")
    return [first, *fields([("build", str(result.get("build", ""))), *_where(result), *_kept(result, kept)])]


def _where(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    about = [("system", str(result.get("system", ""))), ("date", _automatic_date(result))]
    if "instance" not in result:
        kernel = f" (Linux {result['kernel']})" if result.get("kernel") else ""
        return [*about, ("machine", f"{result.get('machine', '')}{kernel}"), ("tried before", str(result.get("retried", "")))]
    clock, model, accelerator = result.get("clock"), str(result.get("cpu", "")), str(result.get("accelerator", ""))
    return [
        *about,
        ("machine", f"{result['machine']}, {_guest(result)}"),
        ("no clone", str(result.get("why_booted", ""))),
        ("tried before", str(result.get("retried", ""))),
        ("accelerator", f"{accelerator.upper()} (QEMU {result.get('qemu', '?')})"),
        ("CPU", cpu(model, result.get("missing_cpu_features", []), accelerator, limit=4)),
        ("clock", f"{moment(clock)} in the guest" if isinstance(clock, (int, float)) else ""),
    ]


def _guest(result: Mapping[str, Any]) -> str:
    """How the build came to the guest that it had."""
    seconds = result.get("boot_s")
    took = format_duration(seconds) if isinstance(seconds, (int, float)) and seconds else ""
    match result.get("guest"):
        case "clone":
            return f"a fresh clone, ready in {took}"
        case "warm":
            return "a fresh clone that was waiting"
        case "kept":
            return f"started in {took} and kept running" if took else "kept running"
    return f"booted for it in {took}" if result.get("own_vm") and took else "which was running"


def _automatic_date(result: Mapping[str, Any]) -> str:
    """A date that was found by itself, and where."""
    return f"{result.get('date', '')}, from {result['date_from']}" if result.get("date_from") else ""


def _kept(result: Mapping[str, Any], kept: Result | None) -> list[tuple[str, str]]:
    if kept is None:
        return []
    shown = short_path(kept.directory)
    if kept.files:
        word = "file" if kept.files == 1 else "files"
        what = "build directory" if result.get("error") else "outputs"
        where = f"{shown}/failed" if result.get("error") else shown
        pairs = [(what, f"{where} ({kept.files} {word}, {format_size(kept.size)})")]
    else:
        pairs = [("record", f"{shown}/build.json")]
    return [*pairs, *(("left out", f"{link} (leads out of the outputs)") for link in kept.left_out)]


def short_path(path: Path) -> str:
    """Relative to the current directory when it is inside."""
    try:
        return str(path.relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def builds_table(rows: Iterable[Mapping[str, Any]], now: float, width: int | None = None) -> str:
    """`offload builds`; see `fitting_table` for `width`."""

    def row(build: Mapping[str, Any]) -> dict[str, str]:
        duration = build.get("duration_s")
        return {
            "BUILD": str(build["build"]),
            "NAME": f"{build['name']} {build['version']}",
            "STATE": str(build["state"]),
            "SYSTEM": str(build.get("system") or "-"),
            "MACHINE": str(build["machine"] or "-"),
            "DATE IN GUEST": str(build.get("date") or "-"),
            "TOOK": format_duration(duration) if isinstance(duration, (int, float)) else "-",
            "CREATED": ago(build["created"], now),
        }

    return fitting_table([row(build) for build in rows], width, ("DATE IN GUEST", "TOOK", "MACHINE"))


def images_table(rows: Iterable[Mapping[str, Any]], now: float) -> str:
    def row(image: Mapping[str, Any]) -> list[str]:
        size = image.get("size_on_disk")
        system = f"{image['suite']} {image['architecture']}" if image.get("suite") else "a disk file"
        kernel, made = str(image.get("kernel_version") or "-"), image.get("made")
        when = ago(parse_date(made).timestamp(), now) if made else "-"
        return [
            image["name"],
            image["digest"][:12] or "-",
            image["state"],
            system,
            kernel,
            format_size(size) if size else "-",
            when,
        ]

    return table(["NAME", "DIGEST", "STATE", "SYSTEM", "KERNEL", "SIZE", "MADE"], map(row, rows))


def image_text(image: Mapping[str, Any], now: float) -> str:
    """`offload image show`."""
    recipe, made, size = image.get("recipe", {}), image.get("made"), image.get("size_on_disk")
    packages, boot = image.get("packages", {}), image.get("disk", {})
    foreign, disk_size = recipe.get("kind") == "file", boot.get("size") or recipe.get("size")
    pairs = [
        ("state", str(image.get("state", ""))),
        ("digest", str(image["digest"])),
        ("system", "a disk file" if foreign else f"{recipe.get('suite', '?')} {recipe.get('architecture', '?')}"),
        ("comes from", str(recipe.get("path") or recipe.get("url") or "")),
        ("format", str(boot.get("format", ""))),
        ("kernel", str(image.get("kernel_version") or recipe.get("kernel", ""))),
        ("made", f"{made} ({ago(parse_date(made).timestamp(), now)})" if made else ""),
        ("size on disk", format_size(size) if size else ""),
        ("disk in the guest", format_size(disk_size) if disk_size else ""),
        ("directory", str(image.get("directory", ""))),
        ("packages", f"{len(packages)} (--json names them)" if packages else ", ".join(recipe.get("packages") or [])),
    ]
    return "\n".join([clean(str(image["name"])), *fields(pairs)])


def environments_table(rows: Iterable[Mapping[str, Any]], now: float, width: int | None = None) -> str:
    """`offload env list`; see `table` for `width`."""

    def row(environment: Mapping[str, Any]) -> list[str]:
        recipe = environment["recipe"]
        names = " ".join(recipe["packages"]) or "-"
        made = ago(parse_date(environment["made"]).timestamp(), now)
        system = f"{recipe['suite']} {recipe['architecture']}"
        return [environment["digest"][:12], system, format_size(environment["size"]), made, one_line(names, room)]

    room = _PACKAGES if width is None else max(width - _BEFORE_PACKAGES, _NARROWEST)
    return table(["DIGEST", "SYSTEM", "SIZE", "MADE", "PACKAGES"], map(row, rows), width)


def machines_table(rows: Iterable[Mapping[str, Any]], now: float, width: int | None = None) -> str:
    """`offload vm list`: each machine, and below it the guests of it that run for builds; see `fitting_table` for `width`."""

    def row(machine: Mapping[str, Any], name: str, state: str) -> dict[str, str]:
        private = machine.get("private_memory")
        return {
            "NAME": name,
            "KIND": str(machine.get("kind") or ""),
            "STATE": f"{state} ({ago(machine['since'], now)})" if machine.get("since") else state,
            "DATE": str(machine["date"] or "today"),
            "CPU": str(machine.get("cpu") or "by date"),
            "vCPUs": str(machine["cpu_count"]),
            "MEMORY": format_size(machine["memory_mib"] << 20),
            "PRIVATE": format_size(private) if private is not None else "-",
            "SSH": str(machine.get("ssh_port") or "-"),
        }

    lines = []
    for machine in rows:
        lines.append(row(machine, str(machine["name"]), str(machine["state"])))
        for guest in machine.get("guests", ()):
            # One that waits has the date of whoever takes it.
            shown = {**guest, "date": "-"} if guest["purpose"] == "warm" else guest
            lines.append(row(shown, f"- {guest['instance']}", _guest_state(guest)))
    return fitting_table(lines, width, ("vCPUs", "KIND", "MEMORY", "CPU", "DATE"))


def _guest_state(guest: Mapping[str, Any]) -> str:
    """What a guest that is no user's machine is there for; the daemon names it after that."""
    use, _, rest = str(guest["instance"]).partition("-")
    if guest["purpose"] == "warm":
        return "waiting"
    return {"build": f"building {rest}", "template": "being saved", "test": "being tested"}.get(use, "running")


def machine_text(machine: Mapping[str, Any], now: float | None = None) -> str:
    """`offload vm show`."""
    now = time.time() if now is None else now
    state = str(machine["state"]) + (f" since {moment(machine['since'])}" if machine.get("since") else "")
    pairs = [("state", state), ("reason", str(machine.get("reason") or "")), ("systems", ", ".join(machine["systems"]))]
    instance = machine.get("instance")
    pairs += _instance_fields(instance, now) if instance else _declared_fields(machine)
    pairs += [
        ("vCPUs", str(machine["cpu_count"])),
        ("memory", format_size(machine["memory_mib"] * 1024 * 1024)),
        ("image", f"{machine['image']} ({instance['image_digest'][:12]})" if instance else str(machine["image"])),
        ("secret root", str(machine.get("secret_root") or "made at the first start")),
        ("console log", str(machine.get("console_log") or "")),
        ("earlier logs", str(machine.get("logs") or "")),
    ]
    detail = [f"  | {line}" for line in clean(str(machine.get("detail") or "")).rstrip().splitlines()]
    return "\n".join([clean(str(machine["name"])), *fields(pairs), *detail])


def _instance_fields(instance: Mapping[str, Any], now: float) -> list[tuple[str, str]]:
    accelerator = str(instance["accelerator"])
    ports = (f"127.0.0.1:{host} -> {guest}" for guest, host in instance["ports"].items())
    return [
        ("clock in the guest", guest_clock(instance["clock"], now)),
        ("CPU", cpu(instance["cpu"], instance["missing_cpu_features"], accelerator)),
        ("accelerator", f"{accelerator.upper()} (QEMU {instance['qemu_version']}, process {instance['pid']})"),
        ("pinning", pinning(instance["cores"]) or "none"),
        ("private memory", "" if instance.get("private_memory") is None else format_size(instance["private_memory"])),
        ("ports", ", ".join(ports)),
    ]


def _declared_fields(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    forwards = machine.get("configuration", {}).get("port-forwardings", {})
    return [
        ("date", f"{machine['date']} at each start" if machine["date"] else "the host's"),
        ("CPU", machine.get("cpu") or "the newest released before that date"),
        ("ports", ", ".join(f"127.0.0.1:{host} -> {guest}" for host, guest in forwards.items())),
    ]
