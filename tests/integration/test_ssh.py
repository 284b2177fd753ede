"""The SSH channel, against a real sshd on loopback."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import asyncssh
import pytest
import trio

from offloadd.bridge import Bridge, open_bridge
from offloadd.errors import SshError
from offloadd.guest import ssh
from offloadd.guest.secret_root import SecretRoot, ensure_secret_root
from offloadd.guest.ssh import Guest, open_ssh

from .real_sshd import SSHD, find_sshd

pytestmark = pytest.mark.skipif(SSHD is None, reason="openssh-server is not installed")

ME = pwd.getpwuid(os.geteuid()).pw_name


@dataclass
class Server:
    """An sshd that has the secrets of one root, as a guest has."""

    secrets: SecretRoot
    port: int
    process: subprocess.Popen[bytes]
    folder: Path


def start_sshd(folder: Path, secrets: SecretRoot, port: int) -> subprocess.Popen[bytes]:
    etc = secrets.root / "etc/ssh"
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\n"
        f"HostKey {etc}/ssh_host_ed25519_key\n"
        f"HostKey {etc}/ssh_host_ecdsa_key\n"
        f"AuthorizedKeysFile {etc}/authorized_keys.d/offloading\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\nLogLevel VERBOSE\n"
    )
    log = (folder / "sshd.log").open("ab")
    with log:
        return subprocess.Popen([find_sshd(), "-D", "-e", "-f", folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=log)


def free_port() -> int:
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port: int = finder.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("sshd does not listen")


def end_children(parent: int) -> None:
    """The connections' own processes, which outlive their sshd; without root, a child's child has the socket."""
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout.split()
    for child in children:
        end_children(int(child))
        with suppress(ProcessLookupError):  # it has seen its child's end
            os.kill(int(child), signal.SIGKILL)


@pytest.fixture(autouse=True)
def my_own_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "ACCOUNT", ME)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    secrets = ensure_secret_root("vm", folder / "secrets")
    port = free_port()
    process = start_sshd(folder, secrets, port)
    try:
        wait_for(port)
        yield Server(secrets, port, process, folder)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    async with open_bridge() as opened:
        yield opened


async def test_a_command_and_its_status(server: Server, bridge: Bridge) -> None:
    async with open_ssh(bridge, server.port, server.secrets) as guest:
        assert await guest.run("printf 'a\\0b'") == (0, b"a\0b")
        assert await guest.run("echo out; echo err >&2; exit 3") == (3, b"out\n")
        assert await guest.run("kill -TERM $$") == (128 + signal.SIGTERM, b"")
        assert await guest.run("cat") == (0, b"")  # there is nothing on its standard input
        status, output = await guest.run("head -c 3000000 /dev/zero")
        assert (status, len(output)) == (0, 1 << 20)


async def test_streams_to_a_program_and_back(server: Server, bridge: Bridge) -> None:
    data = os.urandom(3_000_000)
    received: list[bytes] = []
    async with open_ssh(bridge, server.port, server.secrets) as guest, guest.open_process("cat; echo done >&2") as process:

        async def send() -> None:
            for at in range(0, len(data), 100_000):
                await process.send(data[at : at + 100_000])
            await process.send_eof()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while piece := await process.receive():
                    assert len(piece) <= ssh.PIECE
                    received.append(piece)
            assert await process.receive() == b""
            assert await process.receive_error() == b"done\n"
            assert await process.receive_error() == b""
            assert await process.wait() == 0
    assert b"".join(received) == data


async def test_output_is_there_as_soon_as_it_is_printed(server: Server, bridge: Bridge) -> None:
    async with (
        open_ssh(bridge, server.port, server.secrets) as guest,
        guest.open_process("echo first; read -r _; echo second") as process,
    ):
        with trio.fail_after(10):
            assert await process.receive() == b"first\n"
            await process.send(b"\n")
            assert await process.receive() == b"second\n"


async def test_a_program_sees_the_end_when_its_block_is_left(server: Server, bridge: Bridge, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    async with open_ssh(bridge, server.port, server.secrets) as guest:
        async with guest.open_process(f"echo started; cat; echo ended > {seen}") as process:
            assert await process.receive() == b"started\n"
        with trio.fail_after(10):
            while not seen.exists():
                await trio.sleep(0.05)


async def test_cancelling_a_read_leaves_the_channel_usable(server: Server, bridge: Bridge) -> None:
    async with open_ssh(bridge, server.port, server.secrets) as guest, guest.open_process("cat") as process:
        with trio.move_on_after(0.1) as scope:
            await process.receive()
        assert scope.cancelled_caught
        await process.send(b"x")
        with trio.fail_after(10):
            assert await process.receive() == b"x"


async def test_a_program_that_reads_nothing_slows_the_sender(server: Server, bridge: Bridge) -> None:
    async with open_ssh(bridge, server.port, server.secrets) as guest, guest.open_process("sleep 60") as process:
        with trio.move_on_after(2) as scope:
            for _ in range(1000):
                await process.send(bytes(1 << 20))
        assert scope.cancelled_caught


async def test_writing_to_a_program_that_has_ended(server: Server, bridge: Bridge) -> None:
    async with open_ssh(bridge, server.port, server.secrets) as guest, guest.open_process("exit 7") as process:
        with trio.fail_after(10):
            assert await process.receive() == b""
            assert await process.wait() == 7
            with pytest.raises(SshError, match="the connection broke"):
                while True:
                    await process.send(bytes(1 << 16))


async def test_another_host_key_is_told_at_once(server: Server, bridge: Bridge, tmp_path: Path) -> None:
    other = ensure_secret_root("other", tmp_path / "secrets")
    with trio.fail_after(10), pytest.raises(SshError, match="a host key that is not ours") as caught:
        async with open_ssh(bridge, server.port, other):
            pytest.fail("it was believed")
    assert caught.value.subject == "other"
    assert str(server.port) in caught.value.hint


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-\xff\r\n", b"SSH-2.0-x\r\n\0\0\0\x0c\x0a\x14" + bytes(100)], ids=["not ASCII", "a packet cut off"]
)
async def test_nonsense_of_a_guest_is_an_error_of_ours(said: bytes, bridge: Bridge, tmp_path: Path) -> None:
    async def speak(stream: trio.SocketStream) -> None:
        await stream.send_all(said)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, speak, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(20), pytest.raises(SshError, match="speaks no SSH that is understood"):
            async with open_ssh(bridge, port, ensure_secret_root("hostile", tmp_path)):
                pass
        nursery.cancel_scope.cancel()


async def test_a_key_that_is_refused_is_told_at_once(server: Server, bridge: Bridge, tmp_path: Path) -> None:
    stranger = ensure_secret_root("vm", tmp_path / "secrets", server.secrets.root)
    authorized = server.secrets.root / "etc/ssh/authorized_keys.d/offloading"
    first = authorized.read_text().splitlines()[0]
    authorized.unlink()
    authorized.write_text(first + "\n")
    with trio.fail_after(10), pytest.raises(SshError, match="key refused") as caught:
        async with open_ssh(bridge, server.port, stranger):
            pytest.fail("it was let in")
    assert "authorized_keys.d" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"garbage"])
async def test_a_damaged_client_key(server: Server, bridge: Bridge, tmp_path: Path, content: bytes) -> None:
    key = tmp_path / "id_ed25519"
    key.write_bytes(content)
    secrets = SecretRoot(machine="vm", root=server.secrets.root, client_key=key)
    with trio.fail_after(10), pytest.raises(SshError, match="is no private key") as caught:
        async with open_ssh(bridge, server.port, secrets):
            pytest.fail("it was let in")
    assert caught.value.subject == str(key)


async def test_it_waits_for_an_sshd_that_is_not_there_yet(bridge: Bridge, server: Server) -> None:
    port = free_port()
    folder = server.folder / "late"
    folder.mkdir()
    late: list[subprocess.Popen[bytes]] = []

    async def start_late() -> None:
        await trio.sleep(0.5)
        # First somebody who takes connections and drops them, as QEMU does.
        with socket.socket() as dropping:
            dropping.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            dropping.bind(("127.0.0.1", port))
            dropping.listen()
            connection, _ = await trio.to_thread.run_sync(dropping.accept)
            connection.close()
        late.append(start_sshd(folder, server.secrets, port))

    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(start_late)
                async with open_ssh(bridge, port, server.secrets) as guest:
                    assert (await guest.run("true"))[0] == 0
    finally:
        for process in late:
            process.terminate()
            process.wait()


async def test_the_callers_limit_ends_the_waiting(bridge: Bridge, server: Server) -> None:
    with trio.move_on_after(0.5) as scope:
        async with open_ssh(bridge, free_port(), server.secrets):
            pytest.fail("nobody is there")
    assert scope.cancelled_caught
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with trio.move_on_after(0.5) as scope:
            async with open_ssh(bridge, silent.getsockname()[1], server.secrets):
                pytest.fail("nobody speaks")
        assert scope.cancelled_caught


async def test_a_connection_that_breaks(bridge: Bridge, server: Server) -> None:
    folder = server.folder / "breaking"
    folder.mkdir()
    port = free_port()
    process = start_sshd(folder, server.secrets, port)
    try:
        async with open_ssh(bridge, port, server.secrets) as guest, guest.open_process("cat") as channel:
            await channel.send(b"x")
            assert await channel.receive() == b"x"
            end_children(process.pid)
            with trio.fail_after(10):
                with pytest.raises(SshError, match="the connection broke"):
                    while await channel.receive():
                        pass
                    await channel.send(b"x")
                with pytest.raises(SshError):
                    await guest.run("true")
    finally:
        process.terminate()
        process.wait()


async def test_a_guest_that_never_starts_the_program(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        async def create_process(self, command: str, encoding: str | None) -> None:
            await asyncio.sleep(3600)

    monkeypatch.setattr(ssh, "OPEN_S", 0.1)
    guest = Guest(bridge, cast("asyncssh.SSHClientConnection", Connection()), "vm")
    with trio.fail_after(10), pytest.raises(SshError, match="started no program"):
        async with guest.open_process("true"):
            pass
