"""`offload nix-hook VERBOSITY`: the setting `build-hook` of Nix, in front of the real `nix __build-remote`.

Nix writes its settings, then requests, both in numbers of 8 bytes (little-endian) and strings (length, bytes, zeros up to a
multiple of 8); the answers are lines on standard error: `# accept` and the machine's name, `# decline`, `# decline-permanently`
(do not ask again), `# postpone`.  (Nix, src/libstore/build/hook-instance.cc and src/nix/build-remote/build-remote.cc.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from offloadd.hook.ask import Answer, Unanswered, ask, copied_keys
from offloadd.hook.relay import Input, Real, find_program, write_all

OUT = 2
MAX_STRING = 1 << 24
MAX_STRINGS = 1 << 20

_NUMBER = struct.Struct("<Q")


class NotNix(Exception):
    """What we read is not what Nix writes."""


def run(arguments: Sequence[str]) -> int:
    """Answer Nix's requests; the exit status."""
    try:
        nix = find_program("nix", "OFFLOAD_NIX")
        if len(arguments) != 1 or not arguments[0].isdigit():
            raise NotNix("nix-hook is started by Nix, with its verbosity as the only argument")
        return Hook([nix, "__build-remote", *arguments], Input(0)).serve()
    except EOFError:
        return 0
    except (FileNotFoundError, NotNix) as exc:
        write_all(OUT, f"offload: {exc}\n# decline-permanently\n".encode())
        return 1


class Hook:
    """One hook: it answers requests until one was accepted, or there are no more.

    Args:
        command: the real program with its arguments.
    Raises:
        EOFError, NotNix: no settings came.
    """

    def __init__(self, command: Sequence[str], inlet: Input) -> None:
        self._command = command
        self._inlet = inlet
        self._settings = _read_settings(inlet)
        self._configuration = os.environ.get("NIX_CONF_DIR") or "/etc/nix"
        self._plain: Real | None = None
        self._no_plain = False
        """It has said that it never will."""
        self._warned = False
        self._accepted = False

    def serve(self) -> int:
        """Answer; the exit status."""
        while (request := self._read_request()) is not None:
            raw, answer = request
            try:
                status = self._answer(answer, raw)
            except OSError as exc:  # no such program
                if self._accepted:
                    raise
                # Without an answer Nix would have the build fail.
                status = None
                write_all(OUT, f"offload: {exc}\n# decline\n".encode())
            if answer is not None:
                answer.release()
            if status is not None:
                return status
        if self._plain is not None:
            self._plain.close()
        return 0

    def _answer(self, answer: Answer | None, raw: bytes) -> int | None:
        """The build's status when it was accepted, and is done."""
        if answer is None or answer.decision == "decline":
            return self._try_plain(raw, alone=answer is None)
        if answer.decision == "accept":
            return self._hand_over(answer, raw)
        write_all(OUT, b"# postpone\n")
        return None

    def _read_request(self) -> tuple[bytes, Answer | None] | None:
        """The next request as it came and what our daemon says to it; None when there is none."""
        try:
            if _read_string(self._inlet) != b"try":
                return None
        except EOFError:
            return None
        willing = _read_number(self._inlet)
        system, derivation = _read_string(self._inlet), _read_string(self._inlet)
        count = _read_number(self._inlet)
        if count > MAX_STRINGS:
            raise NotNix(f"a list of {count} strings")
        features = [_read_string(self._inlet) for _ in range(count)]
        raw = b"".join(
            [
                _string(b"try"),
                _NUMBER.pack(willing),
                _string(system),
                _string(derivation),
                _NUMBER.pack(count),
                *(_string(feature) for feature in features),
            ]
        )
        return raw, self._ask(bool(willing), system.decode(errors="replace"), [f.decode(errors="replace") for f in features])

    def _ask(self, willing: bool, system: str, features: list[str]) -> Answer | None:
        local = willing and self._builds_here(system, features)
        try:
            return ask("nix", system, features, local=local, keys=copied_keys(self._configuration))
        except Unanswered as exc:
            if not exc.absent and not self._warned:
                self._warned = True
                write_all(OUT, f"offload: {exc}\n".encode())
            return None

    def _builds_here(self, system: str, features: list[str]) -> bool:
        """Whether Nix itself can build that, when it has a slot."""
        systems = [*self._words(b"system"), *self._words(b"extra-platforms")]
        return system in systems and set(features) <= set(self._words(b"system-features"))

    def _words(self, name: bytes) -> list[str]:
        return self._settings.get(name, b"").decode(errors="replace").split()

    def _start(self, builders: bytes | None = None) -> Real:
        settings = self._settings if builders is None else {**self._settings, b"builders": builders}
        real = Real(self._command, os.environ, OUT)
        real.send(
            b"".join(_NUMBER.pack(1) + _string(name) + _string(value) for name, value in settings.items()) + _NUMBER.pack(0)
        )
        return real

    def _try_plain(self, raw: bytes, *, alone: bool) -> int | None:
        """As without us.  The status when that accepted the build and has done it.

        Args:
            alone: our daemon is absent.
        """
        if self._no_plain:
            write_all(OUT, b"# decline\n")
            return None
        if self._plain is None:
            self._plain = self._start()
        self._plain.send(raw)
        reply = self._plain.reply()
        if reply == b"# accept\n":
            return self._accept(self._plain)
        if reply == b"# decline-permanently\n" or not reply:
            # It has no machines; that says nothing of ours, which may take the next build.
            self._plain.close()
            self._plain, self._no_plain = None, True
            reply = reply if reply and alone else b"# decline\n"
        write_all(OUT, reply)
        return None

    def _hand_over(self, answer: Answer, raw: bytes) -> int | None:
        """To the real program, which knows of that one machine only."""
        real = self._start(answer.entry.encode())
        real.send(raw)
        reply = real.reply()
        if reply == b"# accept\n":
            if self._plain is not None:
                self._plain.close()
            return self._accept(real)
        real.close()
        write_all(OUT, b"# postpone\n" if reply == b"# postpone\n" else b"# decline\n")
        return None

    def _accept(self, real: Real) -> int:
        """The status of the build, which the real program does now."""
        self._accepted = True
        write_all(OUT, b"# accept\n")
        return real.relay(self._inlet)


def _read_settings(inlet: Input) -> dict[bytes, bytes]:
    settings: dict[bytes, bytes] = {}
    while _read_number(inlet):
        name = _read_string(inlet)
        settings[name] = _read_string(inlet)
        if len(settings) > MAX_STRINGS:
            raise NotNix("settings without an end")
    return settings


def _read_number(inlet: Input) -> int:
    number: int = _NUMBER.unpack(inlet.exactly(_NUMBER.size))[0]
    return number


def _read_string(inlet: Input) -> bytes:
    length = _read_number(inlet)
    if length > MAX_STRING:
        raise NotNix(f"a string of {length} bytes")
    text = inlet.exactly(length)
    if any(inlet.exactly(-length % 8)):
        raise NotNix("a string that is not padded with zeros")
    return text


def _string(text: bytes) -> bytes:
    return _NUMBER.pack(len(text)) + text + bytes(-len(text) % 8)
