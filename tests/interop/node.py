"""Chroots with the real Guix, Nix and OpenSSH in them, each a small machine of its own.

One root file system is made by mmdebstrap and kept in the user's cache by the digest of its recipe.  Each node is an overlay
on it in its own mount, process, IPC and host name namespace; the network is the host's, so nodes differ in their ports.
Root alone can do that.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import trio

from offloadd.cache import Cache, scratch
from offloadd.debian import bootstrap, find_mirrors
from offloadd.digest import json_digest
from offloadd.errors import HostError
from offloadd.paths import find_paths
from offloadd.process import run_program
from tests.conftest import REPOSITORY

SUITE = "sid"
PACKAGES = ("guix", "nix-bin", "openssh-client", "openssh-server", "guile-fibers", "busybox-static", "python3")
WITHOUT = ("man", "locale", "info", "doc")
USER = "offloading"
_ACCOUNT = (
    f'chroot "$1" useradd --system --uid 900 --create-home --home-dir /var/lib/{USER} --shell /bin/sh --password "*" {USER}'
)
NIX_CONF = f"""\
build-users-group =
experimental-features = nix-command
sandbox = false
substitute = false
trusted-users = root {USER}
"""

# What busybox is to do between unshare(1) and the node's first process.  $1 the root, $2 the host name, then what is bound.
_SETUP = r"""
set -e
root=$1 name=$2; shift 2
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=0755 dev "$root/dev"
for device in null zero full random urandom tty; do
    : >"$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"; ln -s fd/1 "$root/dev/stdout"; ln -s fd/2 "$root/dev/stderr"
mount -t tmpfs -o mode=0755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
for shared; do
    mkdir -p "$root$shared"; mount --bind "$shared" "$root$shared"
done
hostname "$name"
# Builds in containers make `/` private, which fails when it is no mount point: chroot(8) alone would not do.
mkdir -p "$root/.host"; cd "$root"; pivot_root . .host
exec chroot . /bin/sh -c 'umount -l /.host && echo up && read -r _' </dev/fd/3
"""


RECIPE = {"suite": SUITE, "packages": PACKAGES, "without": WITHOUT, "account": _ACCOUNT, "format": 1}


@contextmanager
def open_root() -> Iterator[Path]:
    """The unpacked root file system of all nodes, made where the cache has none; nobody may write to it."""
    # Made again in a moment: not worth the wait until all its files are on the disk.
    cache = Cache(find_paths().cache / "interop", subject="chroot", durable=False)
    digest = json_digest(RECIPE)
    trio.run(cache.ensure, digest, _make_root)
    with ExitStack() as stack:
        # Another run of the tests, which has just waited for the same one, may hold it for a moment.
        while (found := stack.enter_context(cache.hold(digest))) is None:
            time.sleep(0.1)
        # Those of earlier recipes, unless another run of the tests uses them.
        trio.run(cache.gc, [digest])
        yield found / "root"


async def _make_root(target: Path) -> None:
    room = scratch(target)
    tar = room / "root.tar"
    await bootstrap(
        tar,
        suite=SUITE,
        architecture="amd64",
        packages=PACKAGES,
        mirrors=await find_mirrors(SUITE),
        scratch=room,
        hooks=[_ACCOUNT],
        dpkg_options=[f"path-exclude=/usr/share/{folder}/*" for folder in WITHOUT],
        # A mirror's index of sid is now and then older than it says it may be.
        check_valid_until=False,
        subject="chroot",
    )
    root = target / "root"
    root.mkdir(mode=0o755)
    argv = ["tar", "-x", "-p", "--numeric-owner", "--exclude=./dev/*", "-f", str(tar), "-C", str(root)]
    await run_program(argv, subject="chroot", error=HostError)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@dataclass
class Node:
    """One chroot that runs.  What is started in it ends with it."""

    name: str
    room: Path
    pid: int
    """Its first process, in the host's numbers."""
    ssh_port: int = 0
    """Where its sshd listens; 0: nowhere."""
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def path(self, inside: str) -> Path:
        """A file of the node's, as the host reaches it."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def command(self, *argv: str | Path, user: str | None = None) -> list[str]:
        """What runs `argv` in the node when it is run on the host."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--ipc", "--"]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"] if user else []
        # nsenter's own --wd looks the directory up on the host.
        return [*enter, "/bin/sh", "-c", 'cd / && exec "$@"', "sh", *become, *map(str, argv)]

    def run(
        self,
        *argv: str | Path,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        status: int | None = 0,
        limit_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the node's to its end, and check its exit status unless that is None."""
        data = input.encode() if isinstance(input, str) else input or b""
        command = self.command(*argv, user=user)
        done = subprocess.run(command, input=data, env=_environment(env), capture_output=True, timeout=limit_s)
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if status is not None:
            assert done.returncode == status, (
                f"{argv}: exit status {done.returncode}\nstdout: {out}\nstderr: {err}\n{self.logs()}"
            )
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def start(
        self,
        *argv: str | Path,
        log: str,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the node; what it says goes to `log`."""
        with (self.room / f"{log}.log").open("ab") as out:
            process = subprocess.Popen(
                self.command(*argv, user=user),
                stdin=stdin,
                stdout=out,
                stderr=out,
                env=_environment(env),
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def log(self, name: str) -> str:
        """What the programs that log to `name` have said."""
        file = self.room / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def logs(self) -> str:
        """The end of all logs, for the message of a failed test."""
        return "\n".join(
            f"--- {self.name}: {file.stem}\n{file.read_text(errors='replace')[-3000:]}" for file in self.room.glob("*.log")
        )

    def install(self, inside: str, content: str | bytes, *, mode: int = 0o644, owner: int = 0) -> Path:
        """Write a file of the node's, and the folders on the way."""
        target = self.path(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        os.chown(target, owner, owner)
        target.chmod(mode)
        return target

    def start_sshd(self, *authorized: str) -> str:
        """Start sshd with our guests' configuration on a port of its own; returns its host key, `ssh-ed25519 BASE64`."""
        self.path("/run/sshd").mkdir(mode=0o755)
        self.install("/etc/ssh/sshd_config", (REPOSITORY / "images/guest/sshd_config").read_bytes())
        self.install(f"/etc/ssh/authorized_keys.d/{USER}", "".join(f"{key}\n" for key in authorized))
        self.run("ssh-keygen", "-A")
        # Not before the keys, which take seconds: it is free for a moment only.
        self.ssh_port = free_port()
        self.start("/usr/sbin/sshd", "-D", "-e", "-p", str(self.ssh_port), log="sshd")
        wait_until(lambda: "Server listening" in self.log("sshd"), f"sshd of {self.name}", self.logs)
        kind, key = self.path("/etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
        return f"{kind} {key}"

    def start_guix_daemon(
        self, *options: str, env: Mapping[str, str] | None = None, unprivileged: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start guix-daemon as Debian does, as the user guix-daemon, or as root without build users; wait until it answers."""
        argv = ["guix-daemon", "--no-substitutes", "--discover=no", *options]
        if unprivileged:
            caps = ["--inh-caps=+chown", "--ambient-caps=+chown"]
            argv = ["setpriv", "--reuid=guix-daemon", "--regid=guix-daemon", "--clear-groups", *caps, "--", *argv]
        else:
            argv.append("--disable-chroot")
        socket_file = self.path("/var/guix/daemon-socket/socket")
        socket_file.unlink(missing_ok=True)
        daemon = self.start(*argv, log="guix-daemon", env={"LC_ALL": "C.UTF-8"} | dict(env or {}))
        wait_until(socket_file.exists, f"guix-daemon of {self.name}", self.logs)
        return daemon

    def start_nix_daemon(self, *options: str, env: Mapping[str, str] | None = None, conf: str = "") -> subprocess.Popen[bytes]:
        """Start nix-daemon with `conf` after the lines that all nodes have; wait until it answers."""
        self.install("/etc/nix/nix.conf", NIX_CONF + conf)
        socket_file = self.path("/nix/var/nix/daemon-socket/socket")
        socket_file.unlink(missing_ok=True)
        daemon = self.start("nix-daemon", *options, log="nix-daemon", env=env)
        wait_until(socket_file.exists, f"nix-daemon of {self.name}", self.logs)
        return daemon

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End something that `start` has started."""
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
        self._started.remove(process)


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """Nothing of the host's is inside."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"} | dict(
        more or {}
    )


def wait_until(holds: Callable[[], object], what: str, explain: Callable[[], str] = str, *, limit_s: float = 60) -> None:
    """Wait until `holds()` is true; a test that waits in vain says what `explain()` tells."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{explain()}"
        time.sleep(0.05)


@contextmanager
def open_node(root: Path, name: str, shared: Sequence[Path] = ()) -> Iterator[Node]:
    """Run a node on top of `root`.

    Args:
        shared: directories of the host that it has at the same path.
    """
    room = Path(tempfile.mkdtemp(prefix=f"offload-{name}-", dir="/var/tmp"))
    for folder in ("upper", "work", "root"):
        (room / folder).mkdir(mode=0o755)
    layers = f"lowerdir={root},upperdir={room}/upper,workdir={room}/work"
    setup = f'mount -t overlay overlay -o "{layers}" "{room}/root"\n{_SETUP}'
    apart = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--"]
    # The node lives as long as this pipe: also one whose test was killed ends.
    there, here = os.pipe()
    with (room / "setup.log").open("ab") as log:
        process = subprocess.Popen(
            [*apart, "/bin/sh", "-c", setup.replace("/dev/fd/3", f"/dev/fd/{there}"), "sh", room / "root", name, *shared],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[there],
        )
    os.close(there)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == b"up\n", f"{said!r}\n{(room / 'setup.log').read_text()}"
        first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        yield Node(name, room, first)
    finally:
        os.close(here)
        process.wait(timeout=30)
        shutil.rmtree(room)
