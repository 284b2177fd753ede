"""Our ends of the secret service against Guix's own module, (gnu build secret-service), in both directions."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from offloadd.guest.secret_service import HELLO, deliver_secrets
from tests.conftest import REPOSITORY

from .conftest import MakeNode
from .node import Node, free_port, wait_until

LIMIT_S = 60.0
PROGRAM = REPOSITORY / "images/guest/secret-service"
UTF_8 = {"LC_ALL": "C.UTF-8"}

# As Guix's services call it: in a fiber of the Shepherd's.  $1 what, $2 the port, $3 the secret root.  The Shepherd does not
# end its fibers; when the library does, it hangs now and then.
_SCHEME = """\
(use-modules (gnu build secret-service) (fibers) (ice-9 match))
(setvbuf (current-output-port) 'line)
(define (run thunk)
  (run-fibers
   (lambda ()
     (let ((result (catch #t thunk (lambda (key . rest) (list 'failed key)))))
       (format #t "result: ~s~%" result)
       (force-output)
       (primitive-_exit 0)))
   #:drain? #f))
(define (address port) (make-socket-address AF_INET INADDR_LOOPBACK (string->number port)))
(match (cdr (command-line))
  (("receive" port) (run (lambda () (secret-service-receive-secrets (address port)))))
  (("send" port) (run (lambda () (secret-service-send-secrets (address port) #f))))
  (("send" port root) (run (lambda () (secret-service-send-secrets (address port) root)))))
"""

FILES: dict[str, tuple[bytes, int]] = {
    "etc/guix/acl": (b"(acl)\n", 0o644),
    "etc/ssh/ssh_host_ed25519_key": (b"private\n", 0o600),
    'odd/"quoted" \\ back\\slash\\n; #| (x)': (b"1", 0o640),
    "odd/new\nline\tand tab": (b"2", 0o400),
    "odd/\x01\x1b\x7f control": (b"3", 0o400),
    "odd/d\u00e9j\u00e0 \u65e5\u672c \U0001f600": ("\u00e9\n".encode(), 0o644),
    "odd/ leading blank": (b" \n\n", 0o644),
    "setuid": (b"\0\xff\r\n", 0o4755),
    "empty": (b"", 0o604),
    "large": (os.urandom(1 << 20) * 9, 0o600),
    "zz/after-the-large-one": (b"(secrets (version 0))", 0o600),
}
"""Name -> content and permission bits."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that node and host have at the same path."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def node(make_node: MakeNode, shared: Path) -> Node:
    node = make_node("secrets", [shared])
    node.install("/srv/secrets.scm", _SCHEME)
    return node


def make_root(folder: Path) -> Path:
    """A secret root below `folder`."""
    root = folder / "root"
    for name, (content, mode) in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        (root / name).chmod(mode)
    (root / "a link").symlink_to("setuid")
    (root / "empty-folder").mkdir()
    return root


def found(root: Path) -> dict[str, tuple[bytes, int]]:
    """The regular files below `root`, as in `FILES`."""
    files = [path for path in root.rglob("*") if not path.is_symlink() and path.is_file()]
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode & 0o7777) for path in files}


INSTALLED = FILES | {"a link": FILES["setuid"]}


# Ours to Guix's


class GuixReceiver:
    """Guix's receiver, which serves one client and ends."""

    def __init__(self, node: Node, name: str) -> None:
        self.node, self.name, self.port = node, f"receive-{name}", free_port()

    def start(self) -> None:
        argv = ["guile", "--no-auto-compile", "/srv/secrets.scm", "receive", self.port]
        self.process = self.node.start(*map(str, argv), log=self.name, env=UTF_8)
        wait_until(lambda: "waiting for secrets" in self.node.log(self.name), "Guix's receiver", self.node.logs)

    def result(self) -> str:
        """What it returned, as `write` writes it."""
        self.process.wait(timeout=LIMIT_S)
        return result(self.node.log(self.name))


def result(said: str) -> str:
    match = re.search(r"^result: (.*)$", said, re.MULTILINE)
    assert match, said
    return match[1]


@contextmanager
def in_place(node: Node, root: Path, at: str) -> Iterator[Path]:
    """A secret root whose files go below `at` in the node."""
    outer = root.parent / "outer"
    (outer / at.strip("/")).parent.mkdir(parents=True)
    root.rename(outer / at.strip("/"))
    yield outer


async def test_guix_installs_what_we_send(node: Node, tmp_path: Path) -> None:
    receiver = GuixReceiver(node, "all")
    with in_place(node, make_root(tmp_path), "/srv/all") as root, trio.fail_after(LIMIT_S):
        await trio.to_thread.run_sync(receiver.start)
        await deliver_secrets(receiver.port, root, machine="m")
    names = await trio.to_thread.run_sync(receiver.result)
    assert names.count('"/srv/all/') == len(INSTALLED)
    assert found(node.path("/srv/all")) == INSTALLED
    # Guix's makes no folder that nothing is in, and ours does not ask it to.
    assert not node.path("/srv/all/empty-folder").exists()


async def test_guix_takes_no_files_for_an_answer(node: Node, tmp_path: Path) -> None:
    receiver = GuixReceiver(node, "none")
    with trio.fail_after(LIMIT_S):
        await trio.to_thread.run_sync(receiver.start)
        await deliver_secrets(receiver.port, tmp_path, machine="m")
    assert await trio.to_thread.run_sync(receiver.result) == "()"


async def test_what_is_there_is_replaced(node: Node, tmp_path: Path) -> None:
    node.install("/srv/again/key", "a longer one that was there before", mode=0o400)
    (tmp_path / "srv/again").mkdir(parents=True)
    (tmp_path / "srv/again/key").write_text("new")
    receiver = GuixReceiver(node, "again")
    with trio.fail_after(LIMIT_S):
        await trio.to_thread.run_sync(receiver.start)
        await deliver_secrets(receiver.port, tmp_path, machine="m")
    assert await trio.to_thread.run_sync(receiver.result) == '("/srv/again/key")'
    assert found(node.path("/srv/again")) == {"key": (b"new", 0o644)}


class Obstacles:
    """Stands before Guix's receiver: what QEMU and a guest that boots do to one connection after the other."""

    def __init__(self, receiver: GuixReceiver) -> None:
        self.receiver = receiver
        self.met: list[str] = []
        self._left = [self.silence, self.nothing, self.reset, self.half_a_hello, self.half_a_hello_and_silence]

    async def serve(self, stream: trio.SocketStream) -> None:
        meet = self._left.pop(0) if self._left else self.byte_by_byte
        self.met.append(meet.__name__)
        await meet(stream)

    async def silence(self, stream: trio.SocketStream) -> None:
        """As when the guest's network is not up."""
        assert await stream.receive_some(1) == b"", "the sender began without a hello"

    async def nothing(self, stream: trio.SocketStream) -> None:
        """As when nobody listens in the guest."""

    async def reset(self, stream: trio.SocketStream) -> None:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def half_a_hello(self, stream: trio.SocketStream) -> None:
        await stream.send_all(HELLO[:9])

    async def half_a_hello_and_silence(self, stream: trio.SocketStream) -> None:
        await stream.send_all(HELLO[:-1])
        await self.silence(stream)

    async def byte_by_byte(self, stream: trio.SocketStream) -> None:
        """The real receiver, slowly at first."""
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with await trio.open_tcp_stream("127.0.0.1", self.receiver.port) as guest:
            for byte in await receive_exactly(guest, len(HELLO)):
                await stream.send_all(bytes([byte]))
            while piece := await stream.receive_some():
                await guest.send_all(piece)


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        assert piece
        data += piece
    return data


async def test_our_sender_gets_past_all_that_comes_before_the_guest(node: Node, tmp_path: Path) -> None:
    receiver = GuixReceiver(node, "obstacles")
    obstacles = Obstacles(receiver)
    await trio.to_thread.run_sync(receiver.start)
    with in_place(node, make_root(tmp_path), "/srv/obstacles") as root:
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, host="127.0.0.1")
            (listener,) = await nursery.start(serve, obstacles.serve, 0)
            with trio.fail_after(LIMIT_S):
                await deliver_secrets(listener.socket.getsockname()[1], root, machine="m")
            nursery.cancel_scope.cancel()
    await trio.to_thread.run_sync(receiver.result)
    assert found(node.path("/srv/obstacles")) == INSTALLED
    assert obstacles.met == ["silence", "nothing", "reset", "half_a_hello", "half_a_hello_and_silence", "byte_by_byte"]


# Guix's to ours


class OurReceiver:
    """The program of our images, on a port that the kernel chose."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root = root
        command = [str(PROGRAM), "--root", str(root), "--port", "0", "--timeout", str(LIMIT_S)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        listening = re.search(r"port (\d+)", self.line())
        assert listening
        self.port = int(listening[1])

    def line(self) -> str:
        """The next thing that it says."""
        assert self._process.stderr is not None
        return self._process.stderr.readline()

    def status(self) -> int:
        return self._process.wait(timeout=LIMIT_S)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[OurReceiver]:
    receiver = OurReceiver(tmp_path / "guest")
    yield receiver
    receiver.close()


def guix_sends(node: Node, port: int, root: str | Path | None) -> str:
    """Have Guix's sender deliver; what it returned."""
    argv = ["guile", "--no-auto-compile", "/srv/secrets.scm", "send", str(port), *([] if root is None else [str(root)])]
    return result(node.run(*argv, env=UTF_8, limit_s=LIMIT_S).stdout)


@pytest.fixture(scope="module")
def guix_root(shared: Path) -> Path:
    """A secret root that the node sees."""
    return make_root(shared)


def test_we_install_what_guix_sends(node: Node, guix_root: Path, ours: OurReceiver) -> None:
    assert guix_sends(node, ours.port, guix_root) == f'"{guix_root}"'
    assert ours.line() == f"secret-service: installed {len(INSTALLED)} files\n"
    assert ours.status() == 0
    assert found(ours.root) == INSTALLED


def test_guix_without_a_secret_root(node: Node, ours: OurReceiver) -> None:
    # It returns its secret root, which is #f: for Guix that is also "failed".
    assert guix_sends(node, ours.port, None) == "#f"
    assert ours.line() == "secret-service: installed 0 files\n"
    assert ours.status() == 0
    assert found(ours.root) == {}


REFUSED = {
    # It looks at all files before it sends the first byte.
    "dangling": ("(failed system-error)", "the header is cut off after 0 bytes"),
    # It lists the directory with its size and breaks when it reads it; Guix's own receiver installs what came until then.
    "to-directory": ("(failed system-error)", "a mode that is not a regular file's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_guix_sends_wrong_is_refused_whole(node: Node, shared: Path, ours: OurReceiver, case: str) -> None:
    root = shared / case
    root.mkdir()
    (root / "key").write_text("x")
    (root / "link").symlink_to("nowhere" if case == "dangling" else "/etc")
    returned, said = REFUSED[case]
    assert guix_sends(node, ours.port, root) == returned
    assert said in ours.line()
    assert found(ours.root) == {}
    # The next one is served.
    (root / "link").unlink()
    assert guix_sends(node, ours.port, f"{root}/") == f'"{root}/"'
    assert ours.line() == "secret-service: installed 1 files\n"
    assert found(ours.root) == {"key": (b"x", 0o644)}


async def test_we_notice_what_is_cut_off(node: Node, guix_root: Path, ours: OurReceiver) -> None:
    """In the header, among the files and within the last one; then everything is sent."""
    size = sum(len(content) for content, _ in INSTALLED.values())
    for keep in (40, 2000, size):
        await send_through_relay(node, guix_root, ours, keep)
        assert "cut off" in await trio.to_thread.run_sync(ours.line)
        assert found(ours.root) == {}
    await send_through_relay(node, guix_root, ours, size * 2)
    assert await trio.to_thread.run_sync(ours.line) == f"secret-service: installed {len(INSTALLED)} files\n"
    assert found(ours.root) == INSTALLED


async def send_through_relay(node: Node, root: Path, receiver: OurReceiver, keep: int) -> None:
    """Have Guix send to us what is lost after `keep` bytes."""
    done = trio.Event()

    async def relay(stream: trio.SocketStream) -> None:
        left = keep
        async with await trio.open_tcp_stream("127.0.0.1", receiver.port) as guest:
            await stream.send_all(await receive_exactly(guest, len(HELLO)))
            while left and (piece := await stream.receive_some(left)):
                await guest.send_all(piece)
                left -= len(piece)
        done.set()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), relay, 0)
        with trio.fail_after(LIMIT_S):
            await trio.to_thread.run_sync(guix_sends, node, listener.socket.getsockname()[1], root)
            # All of it may still be in the buffers.
            await done.wait()
        nursery.cancel_scope.cancel()


# A port of QEMU's


async def test_qemu_accepts_long_before_anybody_listens(node: Node, tmp_path: Path) -> None:
    """A real QEMU whose guest does nothing holds each connection; then a guest is there."""
    port = free_port()
    forwarding = f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:1004"
    argv = ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-netdev", forwarding, "-device", "e1000,netdev=n"]
    (tmp_path / "root").mkdir()
    (tmp_path / "root/key").write_text("x")
    qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), "QEMU")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(deliver_secrets, port, tmp_path / "root", machine="m"))
            with trio.move_on_after(1.5):  # at least two tries
                await trio.sleep_forever()
            assert nursery.child_tasks, "delivered to nobody"
            qemu.kill()
            await trio.to_thread.run_sync(qemu.wait)
            command = [str(PROGRAM), "--root", str(tmp_path / "guest"), "--port", str(port)]
            (tmp_path / "guest").mkdir()
            with trio.fail_after(LIMIT_S):
                await trio.run_process(command, stderr=subprocess.DEVNULL)
    finally:
        qemu.kill()
    assert found(tmp_path / "guest") == {"key": (b"x", 0o644)}
