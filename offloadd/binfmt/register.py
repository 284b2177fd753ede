"""Tell the kernel to hand the programs of other architectures to qemu-user, and take that back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from offloadd.binfmt import kernel
from offloadd.binfmt.emulator import find_emulator
from offloadd.binfmt.magic import find_magic
from offloadd.binfmt.record import RECORDS, Records, open_records
from offloadd.binfmt.status import BINFMT_MISC, Registration, Status, entry_name, read_status
from offloadd.errors import NotAllowedError, UsageError
from offloadd.host import native_systems
from offloadd.model.system import SYSTEMS, System


class Change(StrEnum):
    REGISTERED = "registered"
    UNREGISTERED = "unregistered"
    KEPT = "kept"
    """Nothing had to be done."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one system."""

    system: str
    name: str
    """Of the registration."""
    change: Change
    interpreter: str = ""
    """Empty: nothing is or was registered."""
    owner: str = ""
    """Whose the registration is."""


def register(
    systems: Iterable[str], *, force: bool = False, root: Path = BINFMT_MISC, records: Path = RECORDS
) -> list[Outcome]:
    """Register the emulators of `systems`; mounts binfmt_misc when it is not.

    What works already is left alone, whoever made it.  All is checked before anything is changed.

    Args:
        force: register anew what works already, and replace or outdo what somebody else registered or switched off.
        root: where binfmt_misc is mounted.
        records: the file that tells which registrations are ours.

    Raises:
        UsageError: the host runs one of them by itself, or QEMU does not.
        HostError: an emulator is not installed, or the kernel has no binfmt_misc.
        NotAllowedError: we are not root, or somebody else's registration is in the way.
    """
    wanted = [_check_emulated(system) for system in systems]
    emulators = {system.name: find_emulator(system) for system in wanted}
    _check_root("register", wanted)
    kernel.mount(root)
    with open_records(records) as kept:
        status = read_status(root, kept)
        if not force:
            _check_allowed(status, wanted)
        if not status.enabled:
            kernel.switch_on(root)
        return [_register(status, system, emulators[system.name], kept, force=force, root=root) for system in wanted]


def unregister(
    systems: Iterable[str], *, force: bool = False, root: Path = BINFMT_MISC, records: Path = RECORDS
) -> list[Outcome]:
    """Take back what was registered for `systems`.  All is checked before anything is changed.

    Args:
        force: also what somebody else registered.
        root: where binfmt_misc is mounted.
        records: the file that tells which registrations are ours.

    Raises:
        NotAllowedError: we are not root, or a registration is somebody else's.
        HostError: the kernel refuses it.
    """
    wanted = [SYSTEMS[system] for system in systems]
    _check_root("unregister", wanted)
    with open_records(records) as kept:
        status = read_status(root, kept)
        entries = [_removable(status, system, force=force) for system in wanted]
        return [_unregister(system, found, kept, root) for system, found in zip(wanted, entries, strict=True)]


def _check_emulated(name: str) -> System:
    system = SYSTEMS[name]
    if name in native_systems():
        # The kernel would hand every program of the host to an emulator, the emulator included.
        raise UsageError("this host runs it by itself: there is nothing to emulate", subject=name)
    if system.user is None:
        raise UsageError("QEMU has no user-mode emulation of it", subject=name)
    return system


def _check_root(verb: str, systems: Iterable[System]) -> None:
    if os.geteuid() != 0:
        names = " ".join(system.short for system in systems)
        hint = f"sudo {_command()} binfmt {verb} {names}".rstrip()
        raise NotAllowedError(f"only root may {verb} emulators: it is for the whole host", subject="binfmt_misc", hint=hint)


def _command() -> str:
    """How sudo finds us: it has a path of its own, where a virtual environment is not."""
    found = shutil.which("offload")
    return "offload" if found is None or found.startswith("/usr/") else found


def _check_allowed(status: Status, systems: Iterable[System]) -> None:
    """Raise when something of somebody else's would have to be changed."""
    if not status.enabled:
        raise NotAllowedError("is switched off, and not by offload", subject="binfmt_misc", hint="--force switches it on")
    for system in systems:
        entry = status.find(system.name) or status.named(entry_name(system))
        if entry is None or entry.ours:
            continue
        fault = entry.fault() if entry.covers(system.name) else f"{entry.name} is registered for something else"
        if fault:
            raise NotAllowedError(f"{fault}, and not by offload", subject=system.name, hint="--force registers it all the same")


def _register(status: Status, system: System, emulator: Path, kept: Records, *, force: bool, root: Path) -> Outcome:
    name, entry = entry_name(system), status.find(system.name)
    if entry is not None and not entry.fault() and not force:
        return _outcome(system, entry, Change.KEPT)
    kernel.remove_entry(root, name)
    kept.pop(name, None)
    kept[name] = kernel.add_entry(root, name, find_magic(system.name), emulator)
    return Outcome(system=system.name, name=name, change=Change.REGISTERED, interpreter=str(emulator), owner="offload")


def _outcome(system: System, entry: Registration, change: Change) -> Outcome:
    return Outcome(system=system.name, name=entry.name, change=change, interpreter=entry.interpreter, owner=entry.owner)


def _removable(status: Status, system: System, *, force: bool) -> list[Registration]:
    """What `unregister` takes away for one system."""
    entries = [entry for entry in status.entries if entry.covers(system.name)]
    removable = [entry for entry in entries if entry.ours or force]
    if entries and not removable:
        what = f"{entries[0].name} ({entries[0].interpreter}) was not registered by offload"
        raise NotAllowedError(what, subject=system.name, hint="--force unregisters it all the same")
    return removable


def _unregister(system: System, entries: list[Registration], kept: Records, root: Path) -> Outcome:
    for entry in entries:
        kernel.remove_entry(root, entry.name)
        kept.pop(entry.name, None)
    if not entries:
        return Outcome(system=system.name, name=entry_name(system), change=Change.KEPT)
    return _outcome(system, entries[0], Change.UNREGISTERED)
