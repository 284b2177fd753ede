"""The host's end of the secret service: copies the files of a secret root into a guest that has just booted.

The protocol is Guix's, version 0 (gnu/build/secret-service.scm); the guest's end in our own images is
`images/guest/secret-service`.

    guest -> host   (secret-service-server (version 0))
    host -> guest   (secrets (version 0) (files (("/name" SIZE MODE) ...)))CONTENTS...

without newlines or separators.  MODE is the decimal st_mode.  Nothing is acknowledged: the guest installs and closes.

Names are UTF-8.  Guix's receiver writes `?` for what its locale does not have: a guest in the C locale needs names in ASCII.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio

from offloadd.errors import BootError, ConfigError, Problem, ProtocolError

HELLO = b"(secret-service-server (version 0))"
MAX_FILES = 1000
MAX_TOTAL = 64 * 1024**2
"""What the receiver in our images takes at most, in files and bytes."""
UNFINISHED = ".offload-new"
"""How the name of a file ends while it is written; one that was left so is not sent."""

_RETRY_S = 0.1
_REFUSED_S = 1.0
"""Guix's pause."""
_MIN_HELLO_S = 0.4
_MAX_HELLO_S = 15.0
_CLOSE_S = 10.0
_HINT = "does the image run the secret service?"


@dataclass(frozen=True)
class SecretFile:
    """One file to be installed in the guest; its content is never shown."""

    name: str
    """Absolute, as the guest sees it."""
    mode: int
    """The whole st_mode, type included."""
    content: bytes = field(repr=False)


def encode_header(files: Sequence[SecretFile]) -> bytes:
    """What is sent before the contents."""
    entries = " ".join(f'("{_escape(file.name)}" {len(file.content)} {file.mode})' for file in files)
    return f"(secrets (version 0) (files ({entries})))".encode()


# Guile's reader takes exactly two digits after \x, and other characters as they are.
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"} | {
    chr(code): f"\\x{code:02x}" for code in (*range(9), *range(11, 32), 127)
}


def _escape(name: str) -> str:
    return "".join(_ESCAPED.get(character, character) for character in name)


def read_secret_root(root: Path) -> list[SecretFile]:
    """The files below `root`, sorted by name; a link to a file stands for that file.  Blocks: call it in a thread.

    Raises:
        ConfigError: a file cannot be sent, with every such file: a link to a directory or to nothing (Guix's sender breaks on
            both), a device, a name that is not UTF-8, one that cannot be read; or there are too many.
    """
    problems: list[Problem] = []
    files: list[SecretFile] = []
    for path in _walk(root, problems):
        try:
            files.append(_read_file(path, "/" + str(path.relative_to(root))))
        except (OSError, ValueError) as exc:
            problems.append(_problem(path, exc))
    if len(files) > MAX_FILES or sum(len(file.content) for file in files) > MAX_TOTAL:
        problems.append(_problem(root, ValueError(f"more than {MAX_FILES} files or {MAX_TOTAL >> 20} MiB")))
    if problems:
        raise ConfigError(problems)
    return sorted(files, key=lambda file: file.name)


def _problem(path: Path, exc: OSError | ValueError) -> Problem:
    message = (exc.strerror or str(exc)) if isinstance(exc, OSError) else str(exc)
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    return Problem(file=shown, line=0, field="secret-root", message=f"cannot be sent into a guest: {message}")


def _walk(root: Path, problems: list[Problem]) -> Iterator[Path]:
    """Everything below `root` that is not a directory itself."""

    def note(exc: OSError) -> None:
        problems.append(_problem(Path(exc.filename or root), exc))

    # pathlib has no walk before 3.12.
    for directory, names, files in os.walk(root, onerror=note):
        links = [name for name in names if os.path.islink(os.path.join(directory, name))]  # noqa: PTH114, PTH118
        yield from (Path(directory, name) for name in (*links, *files) if not name.endswith(UNFINISHED))


def _read_file(path: Path, name: str) -> SecretFile:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8") from None
    try:
        about = path.stat()
    except FileNotFoundError:
        raise ValueError("it is a link to something that does not exist") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is a link to a directory" if stat.S_ISDIR(about.st_mode) else "it is not a regular file")
    if about.st_size > MAX_TOTAL:
        raise ValueError(f"it is larger than {MAX_TOTAL >> 20} MiB")
    return SecretFile(name, about.st_mode, path.read_bytes())


async def receive_hello(stream: trio.abc.ReceiveStream) -> bool:
    """Wait for the guest's hello; False when the peer closes before it is complete.

    Raises:
        ProtocolError: whoever is there says something else.
    """
    received = b""
    while len(received) < len(HELLO):
        try:
            piece = await stream.receive_some(256)
        except trio.BrokenResourceError:
            return False
        if not piece:
            return False
        received += piece
        if not HELLO.startswith(received):
            raise ProtocolError(f"no secret service, or another version of it: it says {received[:64]!r}")
    return True


async def send_secrets(stream: trio.abc.Stream, files: Sequence[SecretFile]) -> None:
    """Send the header and the files to a guest that has said hello, and wait until it has taken them.

    Raises:
        trio.BrokenResourceError: the guest closed before it had everything.
    """
    await stream.send_all(encode_header(files))
    for file in files:
        await stream.send_all(file.content)
    if isinstance(stream, trio.abc.HalfCloseableStream):
        await stream.send_eof()
        # The guest closes when the files are in their places.  It owes us no answer: how it ended does not matter.
        with trio.move_on_after(_CLOSE_S):
            try:
                while await stream.receive_some(256):
                    pass
            except trio.BrokenResourceError:
                pass


class ByteChannel(Protocol):
    """Standard input and output of a secret service that an agent has started."""

    async def send(self, data: bytes) -> None: ...
    async def send_eof(self) -> None: ...
    async def receive(self) -> bytes: ...


class ProcessStream(trio.abc.HalfCloseableStream):
    """Such a channel as a stream."""

    def __init__(self, process: ByteChannel) -> None:
        self._process = process

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._process.send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await self._process.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._process.receive()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True, kw_only=True)
class SecretLimits:
    """How long a guest may keep us waiting; the defaults are Guix's (`secret-service-send-secrets`)."""

    retries: int = 60
    """How often a connection that is refused is tried again, a second apart."""
    handshake_timeout_s: float | None = 180.0
    """Seconds from the first connection to the complete hello; None: until the caller's own limit."""
    send_s: float = 60.0
    """For a guest that has said hello to read all that is sent."""


async def deliver_secrets(
    port: int,
    root: Path,
    *,
    machine: str,
    limits: SecretLimits = SecretLimits(handshake_timeout_s=None),
    withheld: Collection[str] = (),
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Copy the files of the secret root `root` into the guest behind 127.0.0.1:`port`.

    QEMU accepts on a forwarded port before the guest listens: then it drops the connection without a byte or, before the
    guest's network is up, holds it for about 75 seconds.  Only a complete hello shows that somebody is there; so each try waits
    for it a quarter of the time that has passed already, which is enough for a slow guest too.  The limits are for all tries
    together: neither silence nor a byte now and then holds us longer.

    Args:
        withheld: names, as the guest sees them, of files that it does not get.
        heard: is called at each complete hello.
    Raises:
        ConfigError: a file of the secret root cannot be sent.
        BootError: one of the limits is over.
        ProtocolError: something else than a secret service answers.
    """
    found = await trio.to_thread.run_sync(read_secret_root, root)
    files = [file for file in found if file.name not in withheld]
    delivery = _Delivery(port, files, limits, machine, heard)
    try:
        await delivery.run()
    except ProtocolError as exc:
        raise ProtocolError(exc.what, subject=machine, hint=_HINT) from exc


class _Delivery:
    """All tries to give one guest its secrets."""

    def __init__(
        self, port: int, files: Sequence[SecretFile], limits: SecretLimits, machine: str, heard: Callable[[], None]
    ) -> None:
        self._port = port
        self._files = files
        self._limits = limits
        self._machine = machine
        self._heard = heard
        self._began = trio.current_time()
        self._refused = 0
        self._heard_once = False

    async def run(self) -> None:
        stream = await self._connect()
        limit_s = math.inf if self._limits.handshake_timeout_s is None else self._limits.handshake_timeout_s
        hello_until = trio.current_time() + limit_s
        while not await self._try(stream, hello_until):
            if trio.current_time() >= hello_until:
                did = "did not take its secrets" if self._heard_once else "gave no hello"
                raise self._failed(f"its secret service {did} within {limit_s:.0f} s")
            await trio.sleep(_RETRY_S)
            stream = await self._connect()

    async def _connect(self) -> trio.SocketStream:
        while True:
            try:
                return await trio.open_tcp_stream("127.0.0.1", self._port)
            except OSError as exc:
                self._refused += 1
                if self._refused > self._limits.retries:
                    raise self._failed(f"its secret service refused {self._refused} connections") from exc
            await trio.sleep(_REFUSED_S)

    async def _try(self, stream: trio.SocketStream, hello_until: float) -> bool:
        """Whether the files were sent to the end."""
        now = trio.current_time()
        hello_s = min(max((now - self._began) / 4, _MIN_HELLO_S), _MAX_HELLO_S, hello_until - now)
        async with stream:
            heard = False
            with trio.move_on_after(max(hello_s, 0)):
                heard = await receive_hello(stream)
            if heard:
                self._heard_once = True
                self._heard()
                return await self._send(stream)
        return False

    async def _send(self, stream: trio.SocketStream) -> bool:
        # The guest installs all or nothing and then listens again: a broken try can be repeated.
        with trio.move_on_after(self._limits.send_s) as limit, suppress(trio.BrokenResourceError):
            await send_secrets(stream, self._files)
            return True
        if limit.cancelled_caught:
            raise self._failed(f"it did not take its secrets within {self._limits.send_s:.0f} s")
        return False

    def _failed(self, what: str) -> BootError:
        return BootError(what, subject=self._machine, hint=_HINT)
