"""The SSH channel into a guest or to a remote host, through asyncssh, which is used in this file and for keys alone."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncssh
import trio

from offloadd.bridge import Bridge
from offloadd.errors import SshError
from offloadd.guest.secret_root import ACCOUNT, SecretRoot
from offloadd.model.machine import SshMachine
from offloadd.vm.console import clean

logging.getLogger("asyncssh").setLevel(logging.CRITICAL)

PIECE = 64 * 1024
RETRY_S = 0.2
LOGIN_S = 30.0
"""One handshake costs a guest under TCG 1.5 s when it is alone on the host's core."""
OPEN_S = 60.0
"""For a guest to start a program, which takes it a fraction of a second."""
KEEPALIVE_S = 30
KEEPALIVES = 4
"""Unanswered ones after which the connection counts as lost."""
MAX_KEY_BYTES = 64 * 1024
"""Of a file with a private key: RSA's with 16384 bits has 13 KiB."""

_LOST = (asyncssh.ConnectionLost, asyncssh.DisconnectError, asyncssh.ChannelOpenError, OSError)


@contextmanager
def _mapped(what: str, machine: str) -> Iterator[None]:
    """Whatever goes wrong in the block is an SshError.

    Not only the library's own errors: bytes of a hostile guest that its decoders do not expect come out as any exception (a
    banner that is not ASCII as UnicodeDecodeError), and that must end no more than what is done with this guest.
    """
    try:
        yield
    except Exception as exc:
        raise _error(what, machine, exc) from exc


def _error(what: str, machine: str, exc: Exception) -> SshError:
    return SshError(f"{what}: {clean(str(exc))[:300] or type(exc).__name__}", subject=machine)


class GuestProcess:
    """One program in the guest with its three streams, as bytes."""

    def __init__(self, bridge: Bridge, process: asyncssh.SSHClientProcess[bytes], machine: str) -> None:
        self._bridge = bridge
        self._process = process
        self._machine = machine

    async def send(self, data: bytes) -> None:
        """Write to standard input, waiting while the guest is slow."""

        async def write() -> None:
            self._process.stdin.write(data)
            await self._process.stdin.drain()

        with _mapped("the connection broke", self._machine):
            await self._bridge.call(write)

    async def send_eof(self) -> None:
        with _mapped("the connection broke", self._machine):
            await self._bridge.run_sync(self._process.stdin.write_eof)

    async def receive(self) -> bytes:
        """Up to `PIECE` bytes of standard output; empty at its end."""
        with _mapped("the connection broke", self._machine):
            return await self._bridge.call(self._process.stdout.read, PIECE)

    async def receive_error(self) -> bytes:
        """The same for standard error."""
        with _mapped("the connection broke", self._machine):
            return await self._bridge.call(self._process.stderr.read, PIECE)

    async def wait(self) -> int:
        """The exit status; 128+N after signal N, 255 when the connection broke first."""
        with _mapped("the connection broke", self._machine):
            done = await self._bridge.call(self._process.wait)
        status = done.returncode
        return 255 if status is None else status if status >= 0 else 128 - status

    async def close(self) -> None:
        with trio.move_on_after(5, shield=True):
            await self._bridge.run_sync(self._process.close)


class Guest:
    """A guest or a remote host that we are logged in to.  Made by `open_ssh` and `open_remote` alone."""

    def __init__(self, bridge: Bridge, connection: asyncssh.SSHClientConnection, machine: str) -> None:
        self._bridge = bridge
        self._connection = connection
        self._machine = machine

    async def wait_lost(self) -> None:
        """Wait until the connection is gone, whoever ended it."""
        await self._bridge.call(self._connection.wait_closed)

    @asynccontextmanager
    async def open_process(self, command: str) -> AsyncIterator[GuestProcess]:
        """Run a command of the guest's shell; leaving the block closes its channel.

        Raises:
            SshError: the guest refuses it or the connection is gone.
        """

        async def create() -> asyncssh.SSHClientProcess[bytes]:
            return await self._connection.create_process(command, encoding=None)

        process = None
        with _mapped("cannot run a command", self._machine), trio.move_on_after(OPEN_S):
            process = await self._bridge.call(create)
        if process is None:
            raise SshError(f"started no program within {OPEN_S:.0f} s", subject=self._machine)
        opened = GuestProcess(self._bridge, process, self._machine)
        try:
            yield opened
        finally:
            await opened.close()

    async def run(self, command: str) -> tuple[int, bytes]:
        """The exit status and standard output of a short command."""
        async with self.open_process(command) as process:
            await process.send_eof()
            output = b""
            while piece := await process.receive():
                output += piece[: max(0, 1024 * 1024 - len(output))]
            return await process.wait(), output


@asynccontextmanager
async def open_ssh(bridge: Bridge, port: int, secrets: SecretRoot, *, user: str | None = None) -> AsyncIterator[Guest]:
    """Log in, trying again until the guest's sshd listens; the caller sets the time limit.

    Args:
        user: by default the account that all guests have for us.
    Raises:
        SshError: the guest shows another host key or refuses ours: no other try would help.
    """
    connection = await _login(bridge, port, secrets, user or ACCOUNT)
    try:
        yield Guest(bridge, connection, secrets.machine)
    finally:
        with trio.move_on_after(5, shield=True):
            await bridge.run_sync(connection.abort)


async def check_host_key(bridge: Bridge, port: int, secrets: SecretRoot) -> None:
    """Wait until the guest's sshd answers with the host key that it was given, where it has no account for us.

    Raises:
        SshError: it shows another one.
    """
    try:
        async with open_ssh(bridge, port, secrets):
            pass
    except SshError as exc:
        # What comes after the host key: whom it lets in is its own affair.
        if not isinstance(exc.__cause__, asyncssh.PermissionDenied):
            raise


async def _login(bridge: Bridge, port: int, secrets: SecretRoot, user: str) -> asyncssh.SSHClientConnection:
    host_keys = [asyncssh.read_public_key(path) for path in secrets.host_keys]

    async def connect() -> asyncssh.SSHClientConnection:
        return await asyncssh.connect(
            "127.0.0.1",
            port,
            username=user,
            known_hosts=(host_keys, [], []),
            client_keys=[str(secrets.client_key)] if secrets.has_account else None,
            config=None,
            agent_path=None,
            server_host_key_algs=["ssh-ed25519"],
            kex_algs=["curve25519-sha256"],
            encryption_algs=["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"],
            compression_algs=None,
            login_timeout=LOGIN_S,
            keepalive_interval=KEEPALIVE_S,
            keepalive_count_max=KEEPALIVES,
        )

    while True:
        try:
            return await bridge.call(connect)
        except asyncssh.HostKeyNotVerifiable as exc:
            hint = f"it did not take the secrets that were sent; is port {port} another machine's?"
            raise SshError("the guest shows a host key that is not ours", subject=secrets.machine, hint=hint) from exc
        except asyncssh.PermissionDenied as exc:
            hint = f"does the secret root hold authorized_keys.d/{user}? see {secrets.root}"
            raise SshError("key refused", subject=secrets.machine, hint=hint) from exc
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
            # Without the cause: nothing of a private key belongs in a message.
            raise SshError("is no private key without a passphrase", subject=str(secrets.client_key)) from None
        except _LOST:
            # QEMU takes the connection before the guest's sshd does: only a handshake proves that somebody is there.
            await trio.sleep(RETRY_S)
        except Exception as exc:
            raise _error("the guest speaks no SSH that is understood", secrets.machine, exc) from exc


@asynccontextmanager
async def open_remote(bridge: Bridge, machine: SshMachine) -> AsyncIterator[Guest]:
    """Log in to a remote host, once: one that does not answer now is the router's to pass over.

    Raises:
        SshError: it cannot be reached, shows another host key, or refuses ours; or our key is not to be used.
    """
    connection = await _connect(bridge, machine)
    try:
        yield Guest(bridge, connection, machine.name)
    finally:
        with trio.move_on_after(5, shield=True):
            await bridge.run_sync(connection.abort)


async def _connect(bridge: Bridge, machine: SshMachine) -> asyncssh.SSHClientConnection:
    where = f"{machine.host}:{machine.port}"
    host_key = _host_key(machine)
    client_key = await trio.to_thread.run_sync(read_private_key, Path(machine.private_key), machine.name)

    async def connect() -> asyncssh.SSHClientConnection:
        return await asyncssh.connect(
            machine.host,
            machine.port,
            username=machine.user,
            # Of a host whose key is known, only that kind of key is asked for.
            known_hosts=([host_key], [], []),
            client_keys=[client_key],
            config=None,
            agent_path=None,
            gss_host=None,
            compression_algs=None,
            connect_timeout=LOGIN_S,
            login_timeout=LOGIN_S,
            keepalive_interval=KEEPALIVE_S,
            keepalive_count_max=KEEPALIVES,
        )

    try:
        return await bridge.call(connect)
    except asyncssh.HostKeyNotVerifiable as exc:
        hint = f"another host answers at {where}, or its key was changed: `ssh-keyscan -p {machine.port} {machine.host}`"
        raise SshError("shows another host key than its `host-key`", subject=machine.name, hint=hint) from exc
    except asyncssh.PermissionDenied as exc:
        hint = f"is the public half of {machine.private_key} in ~{machine.user}/.ssh/authorized_keys there?"
        raise SshError(f"refuses our key for the user {machine.user}", subject=machine.name, hint=hint) from exc
    except (asyncssh.DisconnectError, ConnectionResetError, BrokenPipeError) as exc:
        # OpenSSH just closes when it has no host key of the kind that it is asked for; what was on its way then is answered
        # by a reset.
        hint = f"does it have a host key of the kind {host_key.get_algorithm()}? `ssh-keyscan -p {machine.port} {machine.host}`"
        raise SshError(f"the login at {where} was broken off: {_words(exc)}", subject=machine.name, hint=hint) from exc
    except OSError as exc:
        raise SshError(f"does not answer at {where}: {_words(exc)}", subject=machine.name, hint=_REACH_HINT) from exc
    except Exception as exc:
        raise _error(f"{where} speaks no SSH that is understood", machine.name, exc) from exc


_REACH_HINT = "is it up, and is its sshd at that port? `offload machine offline NAME` leaves it alone"


def _words(exc: Exception) -> str:
    """What an error of the library or of the host says, safe to show."""
    if isinstance(exc, TimeoutError):
        return "timed out"
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno in errno.errorcode:
        # asyncio's own words for it are "Connect call failed".
        return os.strerror(exc.errno)
    return clean(getattr(exc, "strerror", None) or str(exc))[:300] or type(exc).__name__


def _host_key(machine: SshMachine) -> asyncssh.SSHKey:
    try:
        return asyncssh.import_public_key(machine.host_key)
    except asyncssh.KeyImportError as exc:
        hint = f"`ssh-keyscan -p {machine.port} {machine.host}` shows the keys that it has"
        raise SshError(f"its `host-key` is no public key: {_words(exc)}", subject=machine.name, hint=hint) from exc


def read_private_key(path: Path, machine: str) -> asyncssh.SSHKey:
    """Our own key.

    Raises:
        SshError: it is not there, other users can read it, or it needs a passphrase.  Never with anything of the key.
    """
    try:
        # Not blocking: a fifo would wait for its writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise SshError(f"its private key {path} is not a file", subject=machine)
            if about.st_mode & 0o077 or about.st_uid not in (0, os.geteuid()):
                what = f"its private key {path} can be used by other users of this host"
                raise SshError(what, subject=machine, hint=f"it must be yours alone: chmod 600 {path}")
            data = os.read(descriptor, MAX_KEY_BYTES)
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise SshError(f"its private key {path} cannot be read: {exc.strerror}", subject=machine) from exc
    try:
        return asyncssh.import_private_key(data)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
        # Without the cause: nothing of a private key belongs in a message.
        raise SshError(f"{path} is no private key without a passphrase", subject=machine) from None
