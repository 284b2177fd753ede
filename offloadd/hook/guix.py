"""`offload guix-hook`: stands behind GUIX= of guix-daemon, in front of the real guix.

guix-daemon runs `guix offload SYSTEM MAX-SILENT-TIME TRACE TIMEOUT` and writes lines `LOCAL SYSTEM DERIVATION FEATURES`; the
answer is `# accept`, `# decline` (build it yourself) or `# postpone` (ask again).  After an `# accept` it writes what the build
needs, and the real program does the rest; its status is the build's.  (Guix: nix/libstore/build.cc, guix/scripts/offload.scm.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from offloadd.hook.ask import Answer, Unanswered, ask, copied_keys
from offloadd.hook.configuration import MACHINES, open_configuration
from offloadd.hook.relay import Input, Real, execute, find_program, write_all

OUT = 1

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
    return Hook([guix, *arguments]).serve(Input(0))


def _is_hook(arguments: Sequence[str]) -> bool:
    return len(arguments) == 5 and arguments[0] == "offload" and arguments[2].isdigit() and arguments[4].isdigit()


class Hook:
    """One hook: it answers requests until one was accepted, or there are no more.

    Args:
        command: the real `guix offload` with its arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._configuration = os.environ.get("GUIX_CONFIGURATION_DIRECTORY") or "/etc/guix"
        self._plain: Real | None = None
        """The real program with the user's own machines."""
        self._warned = False
        self._accepted = False

    def serve(self, inlet: Input) -> int:
        """Answer; the exit status."""
        while line := inlet.line():
            answer = self._ask(line)
            try:
                status = self._answer(answer, line, inlet)
            except OSError as exc:  # no room for a file, or no such program
                if self._accepted:
                    raise
                # Without an answer the build daemon would have the build fail.
                status = None
                write_all(OUT, f"offload: {exc}\n# decline\n".encode())
            if answer is not None:
                answer.release()
            if status is not None:
                return status
        if self._plain is not None:
            self._plain.close()
        return 0

    def _answer(self, answer: Answer | None, line: bytes, inlet: Input) -> int | None:
        """The build's status when it was accepted, and is done."""
        if answer is None or answer.decision == "decline":
            return self._try_plain(line, inlet)
        if answer.decision == "accept":
            return self._hand_over(answer, line, inlet)
        write_all(OUT, b"# postpone\n")
        return None

    def _ask(self, line: bytes) -> Answer | None:
        """None: we have to do without our daemon, or it would not understand."""
        request = _REQUEST.fullmatch(line)
        if request is None:
            return None
        local, system, _, features = (part.decode(errors="replace") for part in request.groups())
        wanted = [feature for feature in features.split(",") if feature]
        try:
            return ask("guix", system, wanted, local=local == "1", keys=copied_keys(self._configuration))
        except Unanswered as exc:
            if not exc.absent and not self._warned:
                self._warned = True
                write_all(OUT, f"offload: {exc}\n".encode())
            return None

    def _try_plain(self, line: bytes, inlet: Input) -> int | None:
        """As without us.  The status when that accepted the build and has done it."""
        if self._plain is None:
            if not os.path.exists(f"{self._configuration}/{MACHINES}"):
                write_all(OUT, b"# decline\n")  # what it would say, without the second that it takes to start
                return None
            self._plain = Real(self._command, os.environ, OUT)
        return self._follow(self._plain, line, inlet)

    def _hand_over(self, answer: Answer, line: bytes, inlet: Input) -> int | None:
        """To the real program, which knows of that one machine only."""
        with open_configuration(self._configuration, answer.entry) as folder:
            real = Real(self._command, {**os.environ, "GUIX_CONFIGURATION_DIRECTORY": folder}, OUT)
            real.send(line)
            reply = real.reply()
            if reply == b"# accept\n":
                if self._plain is not None:
                    self._plain.close()
                return self._accept(real, inlet)
            real.close()
        # It may have died: then the build daemon would wait for an answer in vain.
        write_all(OUT, reply or b"# decline\n")
        return None

    def _follow(self, real: Real, line: bytes, inlet: Input) -> int | None:
        real.send(line)
        reply = real.reply()
        if reply == b"# accept\n":
            return self._accept(real, inlet)
        write_all(OUT, reply)
        return None if reply else real.close() or 1

    def _accept(self, real: Real, inlet: Input) -> int:
        """The status of the build, which the real program does now."""
        self._accepted = True
        write_all(OUT, b"# accept\n")
        return real.relay(inlet)
