"""`offload guix-hook`: stands behind GUIX= of guix-daemon, in front of the real guix.

guix-daemon runs `guix offload SYSTEM MAX-SILENT-TIME TRACE TIMEOUT` and writes lines `LOCAL SYSTEM DERIVATION FEATURES`; the
answer is `# accept`, `# decline` (build it yourself) or `# postpone` (ask again).  After an `# accept` it writes what the build
needs, and the real program does the rest; its status is the build's.  (Guix: nix/libstore/build.cc, guix/scripts/offload.scm.)
"""

from __future__ import annotations

import os
import re

from offloadd.hook.configuration import MACHINES, open_configuration
from offloadd.hook.loop import ACCEPT, DECLINE, Hook, Request
from offloadd.hook.relay import Input, Real, execute, find_program, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from offloadd.hook.ask import Answer

_REQUEST = re.compile(rb"([01]) ([A-Za-z0-9_-]+) (/[^\s]+) ([^\s]*)\n")


def run(arguments: Sequence[str]) -> int:
    """Do what guix-daemon wants; the exit status.

    Args:
        arguments: those that it gives to guix.
    """
    try:
        guix = find_program("guix", "OFFLOAD_GUIX", os.environ.get("GUIX", ""))
    except FileNotFoundError as exc:
        write_all(2, f"offload: {exc}\n".encode())
        return 127
    if not _is_hook(arguments):
        execute([guix, *arguments])
    return GuixHook([guix, *arguments], Input(0), os.environ.get("GUIX_CONFIGURATION_DIRECTORY") or "/etc/guix").serve()


def _is_hook(arguments: Sequence[str]) -> bool:
    return len(arguments) == 5 and arguments[0] == "offload" and arguments[2].isdigit() and arguments[4].isdigit()


class GuixHook(Hook):
    """The hook of one `guix offload`."""

    daemon = "guix"

    def receive(self) -> Request | None:
        """A line; one that we do not understand is for the real program alone."""
        line = self.inlet.line()
        if not line:
            return None
        request = _REQUEST.fullmatch(line)
        if request is None:
            return Request(line)
        local, system, _, features = (part.decode(errors="replace") for part in request.groups())
        return Request(line, system, [feature for feature in features.split(",") if feature], local=local == "1")

    def try_plain(self, request: Request, *, alone: bool) -> int | None:
        if self.plain is None:
            if not os.path.exists(f"{self.configuration}/{MACHINES}"):
                write_all(self.out, DECLINE)  # what it would say, without the second that it takes to start
                return None
            self.plain = Real(self.command, os.environ, self.out)
        self.plain.send(request.raw)
        reply = self.plain.reply()
        if reply == ACCEPT:
            return self.accept(self.plain)
        write_all(self.out, reply)
        return None if reply else self.plain.close() or 1

    def hand_over(self, answer: Answer, request: Request) -> int | None:
        with open_configuration(self.configuration, answer.entry) as folder:
            real = Real(self.command, {**os.environ, "GUIX_CONFIGURATION_DIRECTORY": folder}, self.out)
            real.send(request.raw)
            reply = real.reply()
            if reply == ACCEPT:
                return self.accept(real)
            real.close()
        # It may have died: then the build daemon would wait for an answer in vain.
        write_all(self.out, reply or DECLINE)
        return None
