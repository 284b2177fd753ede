"""What keeps a machine from a build.

A thousand machines take about a millisecond, so nothing is put into words before somebody reads it: an obstacle is the function
that tells it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache

from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import Machine, VmMachine
from offloadd.model.quantity import check_clock_holds, format_date, format_duration, format_size
from offloadd.model.state import MachineMode
from offloadd.model.system import SYSTEMS
from offloadd.route.needs import Emulation, MachineFacts, Needs


class Question:
    """One request as it is put to each machine."""

    __slots__ = ("_clocks", "needs", "now", "on_hurd", "on_packages", "on_vm", "wishes")

    def __init__(self, needs: Needs, now: float) -> None:
        self.needs = needs
        self.now = now
        self.on_hurd = needs.system in _HURD
        self.on_packages = bool(needs.packages) or needs.debian
        self.on_vm = needs.date is not None or needs.cpu is not None or needs.kernel is not None
        count = len(needs.prefer)
        self.wishes = {word: place - count for place, word in reversed(list(enumerate(needs.prefer)))}
        self._clocks: dict[str, str] = {}

    def clock_fault(self, machine: Machine) -> str:
        """Why the machine's clock cannot show the date; asked once for each system type, as there are few."""
        for system in (self.needs.system, machine.systems[0]):
            if system not in self._clocks:
                self._clocks[system] = _clock_fault(self.needs.date, system)
            if self._clocks[system]:
                return self._clocks[system]
        return ""


Tell = Callable[[Question, Machine, MachineFacts], str]
_HURD = frozenset(name for name, system in SYSTEMS.items() if system.kernel == "gnu")
_ONLINE = MachineMode.ONLINE
_NO_ENVIRONMENTS = ("ssh", "childhurd")
"""Kinds of machines that build with what they have; only their owners know what that is."""
UNSEEN = MachineFacts(systems=())
"""What is known of a machine of which nothing is."""


def find_obstacle(question: Question, machine: Machine, known: MachineFacts) -> Tell | None:
    """What keeps the machine from the build, as the function that says so; None when it can and may."""
    return _cannot(question, machine, known) or _may_not(question, machine, known)


def _cannot(question: Question, machine: Machine, known: MachineFacts) -> Tell | None:
    needs = question.needs
    if known is UNSEEN:
        return _tell_unseen
    if needs.system in known.missing:
        return tell_missing
    if needs.system not in known.systems:
        return tell_kernel_of_host if question.on_hurd and machine.kind == "binfmt" else tell_system
    if known.fault:
        return tell_fault
    if not known.takes_builds:
        return _tell_takes_none
    if needs.features and not needs.features.issubset(machine.features):
        return tell_features
    if question.on_packages and machine.kind in _NO_ENVIRONMENTS and (tell := _lacks_packages(needs, machine)):
        return tell
    if question.on_vm and (tell := _cannot_choose(question, machine, known)):
        return tell
    if needs.keep_machine and not _is_vm(type(machine)):
        return _tell_nothing_to_keep
    if needs.network and not machine.network:
        return _tell_network
    if needs.memory_mib is not None and needs.memory_mib > _memory(machine, known, needs.memory_mib):
        return _tell_memory
    if needs.disk is not None and known.disk_free is not None and known.disk_free < needs.disk:
        return _tell_disk
    if needs.quirk and known.emulation is Emulation.USER:
        return _tell_quirk
    return None


def _lacks_packages(needs: Needs, machine: Machine) -> Tell | None:
    if not needs.packages.issubset(machine.features):
        return _tell_no_environment
    if needs.debian and machine.kind != "childhurd":
        return _tell_no_environment
    # Of two systems that run on the Hurd, its file says which one it is.
    if needs.debian and "guix" in machine.features and "debian" not in machine.features:
        return _tell_no_apt
    return None


def _cannot_choose(question: Question, machine: Machine, known: MachineFacts) -> Tell | None:
    """Date, CPU and kernel are a VM's."""
    if not _is_vm(type(machine)):
        return _tell_no_vm
    if question.needs.date is not None and question.clock_fault(machine):
        return _tell_clock
    if question.needs.date is not None and known.stateful:
        return _tell_own_clock
    if question.needs.kernel is not None and known.kernel and not _begins(known.kernel, question.needs.kernel):
        return _tell_kernel
    return None


def _may_not(question: Question, machine: Machine, known: MachineFacts) -> Tell | None:
    if known.mode is not _ONLINE:
        return tell_mode
    if known.breaker.failures:  # the others need not be asked
        state = known.breaker.state(question.now)
        if state == "open":
            return tell_open
        if state == "half-open" and known.busy > 0:
            return tell_trial
    if question.needs.machine is not None and question.needs.machine != machine.name:
        return tell_asked
    return None


@cache
def _is_vm(kind: type[Machine]) -> bool:
    """Remembered: the check of pydantic's classes takes as long as all others together."""
    return issubclass(kind, VmMachine)


def _memory(machine: Machine, known: MachineFacts, otherwise: int) -> int:
    """MiB: a VM has what its file says, whatever is known of the host."""
    if _is_vm(type(machine)):
        assert isinstance(machine, VmMachine)
        return machine.memory_size
    return otherwise if known.memory_mib is None else known.memory_mib


def _clock_fault(date: datetime | None, system: str) -> str:
    try:
        if date is not None:
            check_clock_holds(date, system)
    except ValueError as exc:
        return str(exc)
    return ""


def _begins(version: str, start: str) -> bool:
    """Whether a version begins with another one: 6.1.52 does with 6.1, and 6.10 does not."""
    return version.startswith(start) and not (start[-1:].isdigit() and version[len(start) :][:1].isdigit())


def _tell_unseen(question: Question, machine: Machine, known: MachineFacts) -> str:
    return "nothing is known of it yet"


def tell_missing(question: Question, machine: Machine, known: MachineFacts) -> str:
    return known.missing[question.needs.system]


def tell_system(question: Question, machine: Machine, known: MachineFacts) -> str:
    return f"builds {', '.join(known.systems) or 'nothing'}, not {question.needs.system}"


def tell_kernel_of_host(question: Question, machine: Machine, known: MachineFacts) -> str:
    return "GNU/Hurd is another kernel: qemu-user runs only Linux programs"


def tell_fault(question: Question, machine: Machine, known: MachineFacts) -> str:
    return known.fault


def _tell_takes_none(question: Question, machine: Machine, known: MachineFacts) -> str:
    assert isinstance(machine, VmMachine)
    if isinstance(machine, Childhurd):
        return "takes no builds (`offloading: false` in its file)"
    daemons = " and ".join(f"{daemon}-daemon" for daemon in machine.daemons)
    takes = f"only builds of {daemons} go there" if daemons else "no builds of ours go there"
    return f"boots from a disk of its own ({machine.image}), in which there is no agent of ours: {takes}"


def tell_features(question: Question, machine: Machine, known: MachineFacts) -> str:
    lacking = sorted(question.needs.features.difference(machine.features))
    return f"lacks the {'feature' if len(lacking) == 1 else 'features'} {', '.join(lacking)}"


def _tell_no_environment(question: Question, machine: Machine, known: MachineFacts) -> str:
    if question.needs.debian:
        return "has no environments, in which Debian packages are built"
    lacking = ", ".join(sorted(question.needs.packages.difference(machine.features)))
    return f"has no environments, and its features do not name {lacking}"


def _tell_no_apt(question: Question, machine: Machine, known: MachineFacts) -> str:
    return "has Guix's packages, not Debian's (`features: [debian]` in its file would say that it has these)"


def _tell_no_vm(question: Question, machine: Machine, known: MachineFacts) -> str:
    needs = question.needs
    asked = {"date": needs.date, "CPU": needs.cpu, "kernel": needs.kernel}
    words = " and ".join(word for word, value in asked.items() if value is not None)
    return f"is no VM: its {words} cannot be chosen"


def _tell_nothing_to_keep(question: Question, machine: Machine, known: MachineFacts) -> str:
    return "is no virtual machine: there is nothing to keep"


def _tell_clock(question: Question, machine: Machine, known: MachineFacts) -> str:
    return question.clock_fault(machine)


def _tell_own_clock(question: Question, machine: Machine, known: MachineFacts) -> str:
    return "keeps its disk, so that builds are done in the machine itself, whose clock is not moved"


def _tell_kernel(question: Question, machine: Machine, known: MachineFacts) -> str:
    return f"has kernel {known.kernel}, not {question.needs.kernel}"


def _tell_network(question: Question, machine: Machine, known: MachineFacts) -> str:
    return "gives builds no network (`network: true` in its file would)"


def _tell_memory(question: Question, machine: Machine, known: MachineFacts) -> str:
    return f"has {_memory(machine, known, 0)} MiB of memory, not {question.needs.memory_mib}"


def _tell_disk(question: Question, machine: Machine, known: MachineFacts) -> str:
    return f"has {format_size(known.disk_free or 0)} of disk free, not {format_size(question.needs.disk or 0)}"


def _tell_quirk(question: Question, machine: Machine, known: MachineFacts) -> str:
    needs = question.needs
    return f"{needs.quirk} (to try it again: offload quirks forget {needs.name})"


def tell_mode(question: Question, machine: Machine, known: MachineFacts) -> str:
    return f"is {known.mode} (offload machine resume {machine.name})"


def tell_open(question: Question, machine: Machine, known: MachineFacts) -> str:
    end, left = known.breaker.open_until, format_duration(known.breaker.open_until - question.now)
    until = format_date(datetime.fromtimestamp(end, UTC))
    return f"is left alone until {until} (another {left}) after {known.breaker.failures} failures in a row"


def tell_trial(question: Question, machine: Machine, known: MachineFacts) -> str:
    return f"is being tried with one build after {known.breaker.failures} failures in a row"


def tell_asked(question: Question, machine: Machine, known: MachineFacts) -> str:
    return f"{question.needs.machine} was asked for"
