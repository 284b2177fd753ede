"""`offload nix-hook VERBOSITY`: the setting `build-hook` of Nix, in front of the real `nix __build-remote`.

Nix writes its settings, then requests, both in numbers of 8 bytes (little-endian) and strings (length, bytes, zeros up to a
multiple of 8); the answers are lines on standard error: `# accept` and the machine's name, `# decline`, `# decline-permanently`
(do not ask again), `# postpone`.  (Nix, src/libstore/build/hook-instance.cc and src/nix/build-remote/build-remote.cc.)
"""

from __future__ import annotations

import os
import struct

from offloadd.hook.loop import ACCEPT, DECLINE, POSTPONE, Hook, Request
from offloadd.hook.relay import Input, Real, find_program, write_all
from offloadd.hook.ssh import SshConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from offloadd.hook.ask import Answer

OUT = 2
MAX_STRING = 1 << 24
MAX_STRINGS = 1 << 20

_BUILDERS = b"builders"
_NUMBER = struct.Struct("<Q")
_NEVER = b"# decline-permanently\n"


class NotNix(Exception):
    """What we read is not what Nix writes."""


def run(arguments: Sequence[str]) -> int:
    """Answer Nix's requests; the exit status."""
    try:
        nix = find_program("nix", "OFFLOAD_NIX")
        if len(arguments) != 1 or not arguments[0].isdigit():
            raise NotNix("nix-hook is started by Nix, with its verbosity as the only argument")
        return NixHook([nix, "__build-remote", *arguments], Input(0), os.environ.get("NIX_CONF_DIR") or "/etc/nix").serve()
    except EOFError:
        return 0
    except (FileNotFoundError, NotNix) as exc:
        write_all(OUT, f"offload: {exc}\n".encode() + _NEVER)
        return 1


class NixHook(Hook):
    """The hook of one `nix __build-remote`, which is started while our daemon is asked.

    Its machines are the last of its settings, and their ports are in a file that is read when it calls one.

    Raises:
        EOFError, NotNix: no settings came.
    """

    daemon = "nix"
    out = OUT

    def __init__(self, command: Sequence[str], inlet: Input, configuration: str) -> None:
        super().__init__(command, inlet, configuration)
        self._settings = _read_settings(inlet)
        self._ssh = SshConfig(os.environ.get("NIX_SSHOPTS", ""))
        self._waiting: Real | None = None
        """A real program that has not been told of its machines."""
        self._no_plain = False
        """It has said that it never will."""

    def serve(self) -> int:
        try:
            return super().serve()
        finally:
            if self._waiting is not None:
                self._waiting.abandon()

    def receive(self) -> Request | None:
        try:
            if _read_string(self.inlet) != b"try":
                return None
        except EOFError:
            return None
        willing = _read_number(self.inlet)
        system, derivation = _read_string(self.inlet), _read_string(self.inlet)
        count = _read_number(self.inlet)
        if count > MAX_STRINGS:
            raise NotNix(f"a list of {count} strings")
        features = [_read_string(self.inlet) for _ in range(count)]
        strings = [_string(system), _string(derivation), _NUMBER.pack(count), *map(_string, features)]
        raw = b"".join([_string(b"try"), _NUMBER.pack(willing), *strings])
        wanted = [feature.decode(errors="replace") for feature in features]
        name = system.decode(errors="replace")
        return Request(raw, name, wanted, local=bool(willing) and self._builds_here(name, wanted))

    def _builds_here(self, system: str, features: list[str]) -> bool:
        """Whether Nix itself can build that, when it has a slot."""
        systems = [*self._words(b"system"), *self._words(b"extra-platforms")]
        return system in systems and set(features) <= set(self._words(b"system-features"))

    def _words(self, name: bytes) -> list[str]:
        return self._settings.get(name, b"").decode(errors="replace").split()

    def prepare(self) -> None:
        """Start the real program, which takes as long as we do."""
        if self._waiting is None:
            self._waiting = Real(self.command, {**os.environ, "NIX_SSHOPTS": self._ssh.options}, self.out)
            self._waiting.send(b"".join(_setting(*pair) for pair in self._settings.items() if pair[0] != _BUILDERS))

    def _take(self, builders: bytes | None) -> Real:
        """The one that waits, with these machines; None: as without us."""
        assert self._waiting is not None
        real, self._waiting = self._waiting, None
        if builders is None:
            builders = self._settings.get(_BUILDERS)
        real.send((b"" if builders is None else _setting(_BUILDERS, builders)) + _NUMBER.pack(0))
        return real

    def try_plain(self, request: Request, *, alone: bool) -> int | None:
        if self._no_plain:
            write_all(self.out, DECLINE)
            return None
        if self.plain is None:
            self.plain = self._take(None)
        self.plain.send(request.raw)
        reply = self.plain.reply()
        if reply == ACCEPT:
            return self.accept(self.plain)
        if reply == _NEVER or not reply:
            # It has no machines; that says nothing of ours, which may take the next build.
            self.plain.close()
            self.plain, self._no_plain = None, True
            reply = reply if reply and alone else DECLINE
        write_all(self.out, reply)
        return None

    def hand_over(self, answer: Answer, request: Request) -> int | None:
        self._ssh.add(answer.ssh_config)
        real = self._take(answer.entry.encode())
        real.send(request.raw)
        reply = real.reply()
        if reply == ACCEPT:
            return self.accept(real)
        real.close()
        write_all(self.out, POSTPONE if reply == POSTPONE else DECLINE)
        return None


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


def _setting(name: bytes, value: bytes) -> bytes:
    return _NUMBER.pack(1) + _string(name) + _string(value)
