"""The real secret services of the guests, Linux's in Python and Debian GNU/Hurd's in Perl, against the real sender, and
against peers that mean it ill."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from offloadd.errors import ProtocolError
from offloadd.guest.secret_service import HELLO, SecretFile, deliver_secrets, encode_header

GUEST = Path(__file__).parents[2] / "images/guest"
PROGRAMS = {"linux": GUEST / "secret-service", "hurd": GUEST / "hurd/secret-service"}
LIMIT_S = 30.0


class Service:
    """A running secret service on a port that the kernel chose."""

    def __init__(self, program: Path, root: Path, *options: str) -> None:
        command = [str(program), "--root", str(root), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = re.search(r"port (\d+)", self.process.stderr.readline())
        assert found
        self.port = int(found[1])

    def connect(self) -> socket.socket:
        """A connection on which the hello was received."""
        peer = socket.create_connection(("127.0.0.1", self.port), LIMIT_S)
        assert peer.recv(len(HELLO), socket.MSG_WAITALL) == HELLO
        return peer

    def wait(self) -> tuple[int, str]:
        """Exit status and standard error."""
        _, error = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, error


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    root = tmp_path / "guest"
    (root / "etc/ssh").mkdir(parents=True)
    (root / "etc/ssh/old").write_text("old")
    return root


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    outside = tmp_path / "outside"
    outside.mkdir()
    return outside


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Path:
    return PROGRAMS[request.param]


@pytest.fixture
def start(guest: Path, program: Path) -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def start(*options: str) -> Service:
        started.append(Service(program, guest, *options))
        return started[-1]

    yield start
    for service in started:
        service.process.kill()
        service.process.communicate()


def listing(root: Path) -> dict[str, str | None]:
    """Everything below `root` with the contents of its files."""
    return {str(path.relative_to(root)): path.read_text() if path.is_file() else None for path in sorted(root.rglob("*"))}


def header(*entries: str) -> bytes:
    return f"(secrets (version 0) (files ({' '.join(entries)})))".encode()


def secret_root(tmp_path: Path) -> Path:
    root = tmp_path / "secrets"
    files = {
        "etc/ssh/ssh_host_ed25519_key": ("private\n", 0o600),
        "etc/ssh/authorized_keys.d/offloading": ("ssh-ed25519 AAAA\n", 0o444),
        'etc/odd "name\\ é\n\x01': ("odd", 0o640),
        "empty": ("", 0o644),
        "setuid": ("x" * 300_000, 0o4755),
    }
    for name, (text, mode) in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(mode)
    (root / "link").symlink_to("empty")
    return root


ROOT_KEYS = 'command="/usr/lib/offload/install-packages",restrict ssh-ed25519 AAAA\n'


async def test_the_real_sender_delivers_names_contents_and_modes(
    start: Callable[..., Service], guest: Path, tmp_path: Path, program: Path
) -> None:
    service, root = start(), secret_root(tmp_path)
    with trio.fail_after(LIMIT_S):
        await deliver_secrets(service.port, root, machine="m")
    assert service.wait() == (0, "secret-service: installed 6 files\n")
    sent = {name: text for name, text in listing(root).items() if text is not None}
    made = {"etc/ssh/authorized_keys.d/root": ROOT_KEYS} if program == PROGRAMS["hurd"] else {}
    assert {name: text for name, text in listing(guest).items() if text is not None} == sent | {"etc/ssh/old": "old"} | made
    for name in sent:
        assert (guest / name).lstat().st_mode == (root / name).stat().st_mode
    assert not (guest / "link").is_symlink()
    # sshd reads authorized_keys.d as the user who logs in.
    assert stat.S_IMODE((guest / "etc/ssh/authorized_keys.d").stat().st_mode) == 0o755


async def test_the_sender_waits_for_a_service_that_starts_late(
    start: Callable[..., Service], guest: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as early:
        port = early.getsockname()[1]

        def drop_three() -> None:
            """What QEMU does before the guest listens: accept, and drop without a byte."""
            for _ in range(3):
                early.accept()[0].close()
            early.close()

        dropped = trio.Event()

        async def drop() -> None:
            await trio.to_thread.run_sync(drop_three)
            dropped.set()

        async with trio.open_nursery() as nursery:
            with trio.fail_after(LIMIT_S):
                nursery.start_soon(drop)
                nursery.start_soon(lambda: deliver_secrets(port, secret_root(tmp_path), machine="m"))
                await dropped.wait()
                service = start("--port", str(port))
                assert service.port == port
    assert service.wait()[0] == 0
    assert (guest / "etc/ssh/ssh_host_ed25519_key").read_text() == "private\n"


async def test_the_sender_gives_up_a_connection_that_is_held_in_silence(tmp_path: Path) -> None:
    connections = []

    async def hold(stream: trio.SocketStream) -> None:
        connections.append(stream)
        if len(connections) == 3:
            await stream.send_all(HELLO)
            assert (await stream.receive_some(1000)).startswith(b"(secrets (version 0) (files ((")
            while await stream.receive_some(65536):
                pass
            await stream.aclose()
        else:
            assert await stream.receive_some(1) == b""

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), hold, 0)
        port = listener.socket.getsockname()[1]
        with trio.fail_after(LIMIT_S):
            await deliver_secrets(port, secret_root(tmp_path), machine="m")
        nursery.cancel_scope.cancel()
    assert len(connections) == 3


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", HELLO[:-3] + b"1))", HELLO + b"\n", b"\0" * 100_000])
async def test_the_sender_refuses_another_hello(tmp_path: Path, answer: bytes) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(answer)
            assert await stream.receive_some(1000) == b""
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), greet, 0)
        with trio.fail_after(LIMIT_S), pytest.raises(ProtocolError, match=r"^machine-1: no secret service"):
            await deliver_secrets(listener.socket.getsockname()[1], secret_root(tmp_path), machine="machine-1")
        nursery.cancel_scope.cancel()


ENTRY = '("/etc/ssh/new" 3 33152)'

REFUSED = {
    "dots": (header(ENTRY, '("/etc/../../outside/x" 0 33152)') + b"abc", "is not the absolute name"),
    "dots-at-the-end": (header('("/etc/ssh/.." 0 33152)'), "is not the absolute name"),
    "relative": (header('("etc/x" 0 33152)'), "is not the absolute name"),
    "empty-name": (header('("" 0 33152)'), "is not the absolute name"),
    "only-a-slash": (header('("/" 0 33152)'), "is not the absolute name"),
    "zero-byte": (header('("/etc/a\\x00b" 0 33152)'), "is not the absolute name"),
    "twice": (header(ENTRY, ENTRY) + b"abcabc", "a name comes twice"),
    "link-out": (header(ENTRY, '("/out/x" 1 33152)') + b"abcx", "leads out of the root"),
    "relative-link-out": (header(ENTRY, '("/up/outside/x" 1 33152)') + b"abcx", "leads out of the root"),
    "link-to-root-s-parent": (header(ENTRY, '("/parent/x" 1 33152)') + b"abcx", "leads out of the root"),
    "directory-in-the-way": (header(ENTRY, '("/new/deep/a" 1 33152)', '("/etc" 1 33152)') + b"abcxy", "is a directory here"),
    "file-in-the-way": (header(ENTRY, '("/etc/ssh/old/x" 1 33152)') + b"abcx", "File exists"),
    "file-and-directory": (header('("/n/a" 1 33152)', '("/n" 1 33152)') + b"xy", "is a directory here"),
    "the-same-through-a-link": (
        header('("/etc/ssh/n" 1 33152)', '("/inside/n" 1 33152)') + b"xy",
        "two names lead to the same",
    ),
    "truncated": (header(ENTRY) + b"ab", "1 bytes are missing"),
    "truncated-later": (header(ENTRY, '("/etc/ssh/b" 9 33152)') + b"abc", "9 bytes are missing"),
    "surplus": (header(ENTRY) + b"abcd", "more bytes than the header announces"),
    "newline-after-the-header": (header(ENTRY) + b"\nabc", "more bytes than the header announces"),
    "directory-mode": (header('("/etc/ssh/new" 0 16877)'), "not a regular file's"),
    "device-mode": (header('("/etc/ssh/new" 0 8630)'), "not a regular file's"),
    "huge-mode": (header('("/etc/ssh/new" 0 99999999)'), "not a regular file's"),
    "too-many-files": (header(*(f'("/f/{number}" 0 33152)' for number in range(1001))), "1001 files"),
    "too-large": (header(f'("/etc/ssh/new" {64 * 1024**2 + 1} 33152)'), "more than 67108864 bytes"),
    "too-large-together": (header('("/a" 60000000 33152)', '("/b" 60000000 33152)'), "more than 67108864 bytes"),
    "negative-size": (header('("/etc/ssh/new" -3 33152)'), "not a name, a size and a mode"),
    "size-of-5000-digits": (header(f'("/etc/ssh/new" {"9" * 5000} 33152)'), "not understood"),
    "header-too-long": (b"(secrets (version 0) (files (" + b'("/f" 0 33152) ' * 5000, "longer than 65536 bytes"),
    "header-too-long-but-complete": (header(*['("/f" 0 33152)'] * 5000), "longer than 65536 bytes"),
    "no-end": (b"(" * 70_000, "longer than 65536 bytes"),
    "deep": (b"(" * 30_000 + b")" * 30_000, "not a header of secrets"),
    "version-1": (header(ENTRY).replace(b"version 0", b"version 1") + b"abc", "not a header of secrets, version 0"),
    "http": (b"GET / HTTP/1.0 (x)\r\n\r\n", "not understood"),
    "not-utf8": (header(ENTRY).replace(b"new", b"\xff\xfe") + b"abc", "not understood"),
    "nothing": (b"", "cut off after 0 bytes"),
    "half-a-header": (header(ENTRY)[:30], "cut off after 30 bytes"),
    "no-files": (b"(secrets (version 0) (folders ()))", "lists no files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_peer_leaves_nothing_and_the_next_one_is_served(
    start: Callable[..., Service], guest: Path, outside: Path, case: str
) -> None:
    sent, why = REFUSED[case]
    (guest / "out").symlink_to(outside)
    (guest / "up").symlink_to("..")
    (guest / "parent").symlink_to("../../" + guest.parent.name)
    (guest / "inside").symlink_to("etc/ssh")
    before = listing(guest)
    service = start()
    with service.connect() as peer:
        send_quietly(peer, sent)
    assert service.process.stderr is not None
    line = service.process.stderr.readline()
    assert line.startswith("secret-service: refused: ")
    assert why in line
    assert listing(guest) == before
    assert listing(outside) == {}
    with service.connect() as peer:
        send_quietly(peer, header(ENTRY) + b"abc")
    assert service.wait() == (0, "secret-service: installed 1 files\n")
    assert listing(guest) == before | {"etc/ssh/new": "abc"}


def send_quietly(peer: socket.socket, data: bytes) -> None:
    """Send and wait for the end; a service that has seen enough may have closed already."""
    try:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
    except (BrokenPipeError, ConnectionResetError, OSError):
        pass


@pytest.mark.parametrize("sent", [b"", b"(secrets ", header(ENTRY), header(ENTRY) + b"a", header(ENTRY) + b"abc"])
def test_a_peer_that_stalls_is_dropped(start: Callable[..., Service], guest: Path, sent: bytes) -> None:
    before = listing(guest)
    service = start("--read-timeout", "0.2")
    with service.connect() as peer:
        peer.sendall(sent)
        assert service.process.stderr is not None
        assert service.process.stderr.readline() == "secret-service: refused: the peer is silent for too long\n"
        assert listing(guest) == before
        assert service.process.poll() is None


def test_a_peer_that_drips_bytes_does_not_last_longer_than_the_limit(start: Callable[..., Service], guest: Path) -> None:
    service = start("--timeout", "1")
    with service.connect() as peer:
        began = time.monotonic()
        try:
            while time.monotonic() - began < LIMIT_S:
                peer.sendall(b" ")
                time.sleep(0.02)
        except OSError:
            pass
    assert time.monotonic() - began < 5
    code, error = service.wait()
    assert code == 1
    assert error.endswith("secret-service: no secrets within 1 s\n")


def test_nobody_comes(start: Callable[..., Service]) -> None:
    assert start("--timeout", "0.3").wait() == (1, "secret-service: no secrets within 0.3 s\n")


def test_single_bytes_are_put_together(start: Callable[..., Service], guest: Path) -> None:
    service = start()
    with service.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in header(ENTRY) + b"abc":
            peer.send(bytes([byte]))
        send_quietly(peer, b"")
    assert service.wait()[0] == 0
    assert (guest / "etc/ssh/new").read_text() == "abc"


@pytest.mark.parametrize(
    "sent",
    [
        b' \n; a comment (\n ( secrets\t(version 0)\n(files (("/etc/ssh/new" 3 #o100600))))abc',
        b'(secrets (version 0) (files (("/etc/ssh/new"3 384))))abc',
        b'(secrets (version 0) (files (("/etc/ssh/\\x6eew" 3 33152))))abc',
    ],
)
def test_what_guile_reads_is_read(start: Callable[..., Service], guest: Path, sent: bytes) -> None:
    service = start()
    with service.connect() as peer:
        send_quietly(peer, sent)
    assert service.wait() == (0, "secret-service: installed 1 files\n")
    assert (guest / "etc/ssh/new").stat().st_mode == 0o100600


def test_files_that_were_there_are_replaced_not_written_through(
    start: Callable[..., Service], guest: Path, outside: Path
) -> None:
    (outside / "target").write_text("untouched")
    (guest / "etc/ssh/new").symlink_to(outside / "target")
    service = start()
    with service.connect() as peer:
        send_quietly(peer, header(ENTRY, '("/etc/ssh/old" 2 33188)') + b"abcxy")
    assert service.wait()[0] == 0
    assert (outside / "target").read_text() == "untouched"
    assert not (guest / "etc/ssh/new").is_symlink()
    assert listing(guest) == {"etc": None, "etc/ssh": None, "etc/ssh/new": "abc", "etc/ssh/old": "xy"}


KEYS = """ssh-ed25519 AAAA+/= somebody@somewhere
# a comment
command="sh" ssh-ed25519 BBBB
ssh-ed25519 CC"CC
ssh-ed25519
no-pty ssh-ed25519 DDDD

ssh-rsa EEEE"""


@pytest.mark.parametrize("own", [False, True])
def test_the_key_is_root_s_for_one_command_on_the_hurd(guest: Path, own: bool) -> None:
    service = Service(PROGRAMS["hurd"], guest)
    folder = "/etc/ssh/authorized_keys.d"
    others = [f'("{folder}/root" 3 33152)'] if own else []
    with service.connect() as peer:
        send_quietly(peer, header(f'("{folder}/offloading" {len(KEYS)} 33060)', *others) + KEYS.encode() + b"own"[: 3 * own])
    assert service.wait() == (0, f"secret-service: installed {1 + own} files\n")
    forced = 'command="/usr/lib/offload/install-packages",restrict '
    expected = f"{forced}ssh-ed25519 AAAA+/=\n{forced}ssh-rsa EEEE\n"
    assert (guest / f".{folder}/root").read_text() == ("own" if own else expected)
    assert (guest / f".{folder}/offloading").read_text() == KEYS


def test_without_secrets_the_hurd_reboots_and_nothing_else_starts(guest: Path) -> None:
    service = Service(PROGRAMS["hurd"], guest, "--timeout", "0.2", "--reboot", f"touch {guest}/rebooted; echo rebooted >&2")
    assert service.process.stderr is not None
    told = [service.process.stderr.readline() for _ in range(3)]
    assert told == ["secret-service: no secrets within 0.2 s\n", "secret-service: rebooting\n", "rebooted\n"]
    assert (guest / "rebooted").exists()
    # init would start sshd as soon as it ends.
    with pytest.raises(subprocess.TimeoutExpired):
        service.process.wait(0.3)
    service.process.kill()
    service.process.communicate()


def test_the_hurd_s_programs_need_no_more_than_perl_base() -> None:
    listed = subprocess.run(["dpkg", "-L", "perl-base"], capture_output=True, text=True, check=True).stdout
    for program in ("secret-service", "install-packages"):
        text = (GUEST / "hurd" / program).read_text()
        modules = set(re.findall(r"^use ([A-Z][\w:]+)", text, re.MULTILINE))
        missing = {name for name in modules if f"/{name.replace('::', '/')}.pm\n" not in listed}
        assert not missing
        assert text.startswith("#!/usr/bin/perl\n")


def test_no_files_is_a_valid_answer(start: Callable[..., Service], guest: Path) -> None:
    before = listing(guest)
    service = start()
    with service.connect() as peer:
        send_quietly(peer, encode_header([]))
    assert service.wait() == (0, "secret-service: installed 0 files\n")
    assert listing(guest) == before


def test_wrong_usage(program: Path) -> None:
    for arguments in (["--port"], ["--what", "1"], ["--port", "x"]):
        assert subprocess.run([program, *arguments], stderr=subprocess.DEVNULL, check=False).returncode == 2


def test_a_secret_has_no_content_in_its_repr() -> None:
    assert "key" not in repr(SecretFile("/a", 0o600, b"key"))
    assert all(os.access(program, os.X_OK) for program in PROGRAMS.values())
