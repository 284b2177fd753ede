"""What the kernel was told about the programs of other architectures, by us or by anybody else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from offloadd.binfmt.emulator import needs_loader
from offloadd.binfmt.magic import ET_DYN, ET_EXEC, MACHINES, Magic, elf_header
from offloadd.binfmt.record import Records, load_records
from offloadd.errors import HostError
from offloadd.model.system import SYSTEMS, System

BINFMT_MISC = Path("/proc/sys/fs/binfmt_misc")


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One entry of binfmt_misc."""

    name: str
    enabled: bool
    interpreter: str
    flags: str
    magic: Magic
    made: int
    """When, in nanoseconds since 1970."""
    ours: bool = False
    """Whether offload made it."""
    needs_loader: bool = False
    """Whether its interpreter needs libraries, which an environment does not have."""

    @property
    def owner(self) -> str:
        return "offload" if self.ours else "another program"

    def covers(self, system: str) -> bool:
        """Whether the programs of `system` are handed to it; not for the Hurd's, which QEMU cannot run."""
        return system in MACHINES and all(self.magic.matches(elf_header(system, kind)) for kind in (ET_EXEC, ET_DYN))

    def fault(self) -> str:
        """Why it does not serve a build in an environment; empty when it does."""
        if not self.enabled:
            return f"{self.name} is disabled"
        if "F" not in self.flags:
            return f"{self.name} is registered without the flag F, so it is not found inside an environment"
        if self.needs_loader:
            return f"{self.name} is registered with {self.interpreter}, which needs libraries that an environment does not have"
        return ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """All of binfmt_misc."""

    mounted: bool
    enabled: bool = False
    """The switch for everything."""
    entries: tuple[Registration, ...] = ()
    """The newest first: the kernel takes the first that matches."""

    def find(self, system: str) -> Registration | None:
        """The registration that the kernel takes for `system`, else a disabled one."""
        found = [entry for entry in self.entries if entry.covers(system)]
        return next((entry for entry in found if entry.enabled), found[0] if found else None)

    def named(self, name: str) -> Registration | None:
        """The registration of that name."""
        return next((entry for entry in self.entries if entry.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Which systems can be built through qemu-user now."""

    systems: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    """Each other system that is not native -> why not."""


def entry_name(system: System) -> str:
    """As Debian's packages call it: mmdebstrap looks for this name to know that no emulator must be copied into the root."""
    return f"qemu-{system.user}"


def find_usable(status: Status, native: Collection[str]) -> Usable:
    """Which systems can be built through qemu-user now, and why each other one cannot.

    Args:
        native: the systems that this host runs by itself; nothing is said of them.
    """
    faults = {system.name: find_fault(status, system) for system in SYSTEMS.values() if system.name not in native}
    return Usable(
        systems=tuple(system for system, fault in faults.items() if not fault),
        missing={system: fault for system, fault in faults.items() if fault},
    )


def find_fault(status: Status, system: System) -> str:
    """Why `system` cannot be built through qemu-user now; empty when it can."""
    if system.user is None:
        return f"QEMU has no user-mode emulation of {system.name}"
    remedy = f"offload binfmt register {system.short}"
    entry = status.find(system.name)
    if entry is None:
        return f"{entry_name(system)} is not registered: {remedy}"
    if not status.enabled:
        return f"binfmt_misc is switched off: {remedy} --force"
    if fault := entry.fault():
        return f"{fault}: {remedy}{'' if entry.ours else ' --force'}"
    return ""


def read_status(root: Path = BINFMT_MISC, records: Records | None = None) -> Status:
    """What the kernel was told until now.

    Args:
        root: where binfmt_misc is mounted.
        records: what offload registered; by default as kept on this host.

    Raises:
        HostError: it cannot be read.
    """
    if not (root / "register").exists():
        return Status(mounted=False)
    kept = load_records() if records is None else records
    try:
        files = [file for file in root.iterdir() if file.name not in ("register", "status")]
        found = [entry for file in files if (entry := _read_entry(file, kept)) is not None]
        enabled = (root / "status").read_text().strip() == "enabled"
    except OSError as exc:
        raise HostError(f"cannot be read: {exc.strerror}", subject=str(root)) from exc
    return Status(mounted=True, enabled=enabled, entries=tuple(sorted(found, key=lambda entry: -entry.made)))


def _read_entry(file: Path, records: Records) -> Registration | None:
    """An entry; None when it goes by the names of files, or is gone."""
    try:
        text, made = file.read_text(errors="replace"), file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    entry = parse_entry(file.name, text, made)
    if entry is None:
        return None
    return replace(entry, ours=records.get(entry.name) == made, needs_loader=needs_loader(Path(entry.interpreter)))


def parse_entry(name: str, text: str, made: int) -> Registration | None:
    """What a file of binfmt_misc says; None when it is not about the beginning of files.

    Lines: `enabled` or `disabled`, `interpreter PATH`, `flags: LETTERS`, `offset N`, `magic HEX`, and `mask HEX` unless all
    bits count.
    """
    first, *lines = text.splitlines() or [""]
    values = {key.rstrip(":"): value for key, _, value in (line.partition(" ") for line in lines)}
    try:
        magic = bytes.fromhex(values["magic"])
        mask = bytes.fromhex(values["mask"]) if "mask" in values else b"\xff" * len(magic)
        offset = int(values.get("offset", "0"))
    except (KeyError, ValueError):
        return None
    if len(mask) != len(magic):
        return None
    return Registration(
        name=name,
        enabled=first == "enabled",
        interpreter=values.get("interpreter", ""),
        flags=values.get("flags", ""),
        magic=Magic(magic, mask, offset),
        made=made,
    )
