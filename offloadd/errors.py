"""The tree of errors.

Each error says what happened, to which machine, image or build (`subject`), what to try (`hint`), what the machine said last
(`detail`), and has the exit status of the command line.  Supervisors catch `OffloadError`, never `Exception`.

    OffloadError
      UsageError 2            the caller asked for something that makes no sense
      ConfigError 3           a file is wrong: every problem at once
      SourceError 3           a source is not what its recipe says
      NoMachineError 4        no machine can do this
      NotFoundError 5
      NotAllowedError 6
      BuildFailedError 1      the build's own doing
        EmulatorFault         the doing of the emulator that it ran under: it may pass on another machine
      BuildTimeoutError 124
      CancelledError 130
      TransientError 75       another try can help
        BootError SshError AgentError MachineLostError PortTakenError HostError DaemonError
        ImageError ProtocolError FetchError
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, ClassVar


class OffloadError(Exception):
    """Base of all errors of this project.

    Args:
        what: one sentence without a full stop, not starting with the subject.
        subject: the machine, image, file or build it is about.
        hint: what the reader can try next.
        detail: further lines (a console's last lines, a program's standard error), already free of secrets.
    """

    exit_status: ClassVar[int] = 70
    retryable: ClassVar[bool] = False

    def __init__(self, what: str, *, subject: str = "", hint: str = "", detail: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.subject = subject
        self.hint = hint
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}" if self.subject else self.what

    def render(self) -> str:
        """The whole error as a person reads it."""
        lines = [str(self)]
        if self.detail:
            lines += [f"  | {line}" for line in self.detail.rstrip().splitlines()]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The form in which an error crosses the API; `error_from_json` reads it back."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "subject": self.subject,
            "hint": self.hint,
            "detail": self.detail,
            "exit_status": self.exit_status,
            "retryable": self.retryable,
        }


class UsageError(OffloadError):
    exit_status = 2


@dataclass(frozen=True, kw_only=True, order=True)
class Problem:
    """One thing that is wrong with a file."""

    file: str
    line: int
    column: int = 0
    """Both count from 1; 0 when not known."""
    field: str
    message: str

    def __str__(self) -> str:
        place = ":".join([self.file, *(str(number) for number in (self.line, self.column) if number)])
        return f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"


class ConfigError(OffloadError):
    """One or more files are wrong; `problems` has all of them, in the order of the file."""

    exit_status = 3

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems)
        count = len(self.problems)
        super().__init__("\n".join(str(problem) for problem in self.problems) if count else "configuration is wrong")

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"problems": [vars(problem) for problem in self.problems]}


class SourceError(OffloadError):
    """A source of a recipe is not what the recipe says: another digest, no such file, too large.

    Exit status 3, as for a wrong file: the registry answered, and it gives the same answer until somebody changes the recipe.
    Another try would only hide a source that was exchanged.  A registry that does not answer is a `FetchError`.
    """

    exit_status = 3


class NoMachineError(OffloadError):
    exit_status = 4


class NotFoundError(OffloadError):
    exit_status = 5


class NotAllowedError(OffloadError):
    exit_status = 6


class BuildFailedError(OffloadError):
    exit_status = 1


class EmulatorFault(BuildFailedError):
    """Not the build failed but the emulator that it ran under."""


class BuildTimeoutError(OffloadError):
    exit_status = 124


class CancelledError(OffloadError):
    exit_status = 130


class TransientError(OffloadError):
    """The machine's or the host's doing, not the build's: another try can help."""

    exit_status = 75
    retryable = True


class BootError(TransientError):
    """A machine did not come up; `detail` holds its console's last lines."""


class RebootedError(BootError):
    """It rebooted instead: it may come up at the next try."""


class StalledError(BootError):
    """Its kernel waits for a timer that does not come."""


class SshError(TransientError):
    """The SSH channel into a guest could not be made or broke."""


class AgentError(TransientError):
    """The channel to a guest's agent could not be made or broke, or the agent cannot do what it was asked for."""


class MachineLostError(TransientError):
    """A running machine went away under a build."""


class UnsavableError(MachineLostError):
    """QEMU cannot save a guest like this one, and will not another time."""


class PortTakenError(TransientError):
    """A forwarded port is in use on the host."""


class HostError(TransientError):
    """The host lacks something: a program, disk space, a permission."""


class DaemonError(TransientError):
    """The daemon does not answer or answers nonsense."""


class ImageError(TransientError):
    """An image or environment could not be made, or is damaged."""


class FetchError(TransientError):
    """A source could not be fetched now: the network, a proxy or the server failed."""


class ProtocolError(TransientError):
    """A guest broke the protocol: what it sent is not trusted."""


def is_disk_full(exc: OSError) -> bool:
    return exc.errno in (errno.ENOSPC, errno.EDQUOT)


def _all_subclasses(cls: type[OffloadError]) -> dict[str, type[OffloadError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _all_subclasses(sub)
    return found


def error_from_json(data: dict[str, Any]) -> OffloadError:
    """Make again the error that `OffloadError.to_json` wrote; an unknown class becomes a `DaemonError`."""
    if data.get("error") == "ConfigError":
        return ConfigError([Problem(**problem) for problem in data.get("problems", [])])
    cls = _all_subclasses(OffloadError).get(str(data.get("error")), DaemonError)
    return cls(
        str(data.get("what", "unknown error")),
        subject=str(data.get("subject", "")),
        hint=str(data.get("hint", "")),
        detail=str(data.get("detail", "")),
    )
