"""A world of its own for each test that needs the real command line and the real daemon."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from offloadd.binfmt.status import find_usable, read_status
from offloadd.host import native_systems

if TYPE_CHECKING:
    from tests.long import LongBuilds

REPOSITORY = Path(__file__).parent.parent


# An example that takes long says that the machine has much to do.
settings.register_profile("offload", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("offload")

# A run in the background, or under nohup, has these ignored, and all that it starts inherits that; tests send them.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@dataclass
class World:
    """The directories of one user, in which `offload` is run.  Only the cache is the real user's: images are expensive."""

    root: Path
    cache: Path

    @property
    def state(self) -> Path:
        return self.root / "state/offload"

    @property
    def instances(self) -> Path:
        return self.state / "instances"

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "XDG_STATE_HOME": str(self.root / "state"),
            "XDG_CONFIG_HOME": str(self.root / "config"),
            "XDG_RUNTIME_DIR": str(self.root / "run"),
            "XDG_CACHE_HOME": str(self.cache),
            "COLUMNS": "120",
        }

    def start(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start `offload` with these arguments."""
        return subprocess.Popen(
            [sys.executable, "-m", "offload_cli", *map(str, arguments)],
            env=self.env,
            cwd=cwd or self.root,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self, *arguments: str | Path, status: int | None = 0, cwd: Path | None = None, limit_s: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run `offload` to its end, and check its exit status unless that is None."""
        process = self.start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=limit_s)
        if status is not None:
            assert process.returncode == status, f"exit status {process.returncode}\nstdout: {out}\nstderr: {err}"
        if "exec" not in arguments:
            assert "Traceback" not in err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *arguments: str | Path, status: int | None = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", status=status).stdout)

    def keep_own_templates(self, templates: Path | None = None) -> None:
        """From here on have a cache whose templates a test may damage; images and environments stay the real user's.

        Args:
            templates: where they are to be, by default in this world.
        """
        shared, own = self.cache / "offload", self.root / "cache/offload"
        own.mkdir(parents=True)
        for folder in shared.iterdir():
            if folder.name != "templates":
                (own / folder.name).symlink_to(folder)
        if templates is not None:
            (own / "templates").symlink_to(templates)
        self.cache = own.parent

    def machine(self, name: str, text: str) -> None:
        """Declare a machine of the user's."""
        folder = self.root / "config/offload/machines"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(f"kind: build-vm\nname: {name}\nimage: debian\n{text}")

    def recipe(self, name: str, text: str) -> Path:
        """A directory with an offload.yaml."""
        folder = self.root / "projects" / name
        folder.mkdir(parents=True)
        (folder / "offload.yaml").write_text(f"name: {name}\n{text}")
        return folder

    def qemus(self) -> list[int]:
        """The QEMUs of this world that work for somebody."""
        found = self._all_qemus()
        waiting = self.waiting()
        return [pid for pid in found if pid not in waiting]

    def waiting(self) -> list[int]:
        """Those that wait in a pool, or are made for it: they come and go beside the builds."""
        pools = list(self.instances.glob("warm-*"))
        return [pid for pid in self._all_qemus() if any(has_open_below(pid, folder) for folder in pools)]

    def _all_qemus(self) -> list[int]:
        return [pid for pid, command in _commands() if "qemu-system" in command and has_open_below(pid, self.root)]

    def daemons(self) -> list[int]:
        """The daemons of this world."""
        found = []
        for pid, command in _commands():
            if "offloadd.daemon.main" in command:
                try:
                    environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if f"XDG_STATE_HOME={self.root}/state" in environment.split("\0"):
                    found.append(pid)
        # What it starts looks like itself for a moment.
        return [pid for pid in found if _parent(pid) not in (None, *found)]

    def assert_nothing_left(self) -> None:
        """No QEMU that works for somebody, no directory of one, no file of a build under way."""
        deadline = time.monotonic() + 15
        while (self.qemus() or self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.qemus()
        assert not self._leftovers()

    def _leftovers(self) -> list[Path]:
        used = [path for path in self.instances.glob("*") if not path.name.startswith("warm-")]
        return [*used, *self.state.glob("builds/*/source*")]

    def stop_daemon(self) -> None:
        """End everything of this world, whatever a failed test has left."""
        self.run("daemon", "stop", status=None)
        deadline = time.monotonic() + 30
        while self.daemons() and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in self.daemons() + self._all_qemus():
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.stop_daemon()
        shutil.rmtree(self.root)


def _parent(pid: int) -> int | None:
    """None: it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _commands() -> Iterator[tuple[int, str]]:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            yield int(directory.name), (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def has_open_below(pid: int, folder: Path) -> bool:
    """Does the process have a file below `folder` open?  QEMU's command line names none."""
    with suppress(OSError):  # It has ended.
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # It has closed this one meanwhile, as when its daemon is gone.
                if str(descriptor.readlink()).startswith(f"{folder}/"):
                    return True
    return False


@pytest.fixture(scope="module")
def long(binfmt: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LongBuilds]:
    """The long builds, in a world of their own."""
    from tests.long import start_long_builds

    with _open_worlds() as make, start_long_builds(make(), tmp_path_factory.mktemp("long")) as builds:
        yield builds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: what is left at the end is small, so that no worker waits for another."""
    order = {name: number for number, name in enumerate(("vm", "interop", "integration", "unit"))}
    items.sort(key=lambda item: ("long" not in getattr(item, "fixturenames", ()), order.get(item.path.parent.name, 0)))


@pytest.fixture(scope="module")
def make_world() -> Iterator[Callable[[], World]]:
    """Make worlds; they end with the module."""
    with _open_worlds() as make:
        yield make


@contextmanager
def _open_worlds() -> Iterator[Callable[[], World]]:
    worlds: list[World] = []

    def make() -> World:
        # Directly below /tmp: a socket's path holds 107 bytes.
        root = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
        (root / "run").mkdir(mode=0o700)
        worlds.append(World(root, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")))
        return worlds[-1]

    try:
        yield make
    finally:
        for world in worlds:
            world.close()


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> World:
    """One world for all tests of a module; what a test starts it ends, and the next one finds nothing of it."""
    return make_world()


@pytest.fixture(scope="session")
def binfmt() -> Iterator[tuple[str, ...]]:
    """System types whose programs run here through qemu-user, registered by `offload binfmt` unless they were already.

    The kernel has them for all workers: the last one that uses them takes out what the first one put in.
    """
    systems = ("aarch64-linux", "armhf-linux", "s390x-linux")
    folder = Path(tempfile.gettempdir()) / f"offload-test-binfmt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "users").open("a+") as users:
        with _alone(folder):
            missing = find_usable(read_status(), native_systems()).missing
            if wanted := [system for system in systems if system in missing]:
                _as_root("binfmt", "register", *wanted)
                users.write(" ".join([*wanted, ""]))
                users.flush()
            fcntl.flock(users, fcntl.LOCK_SH)
        yield systems
        with _alone(folder), suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            users.seek(0)
            if registered := sorted(set(users.read().split())):
                _as_root("binfmt", "unregister", *registered)
            users.truncate(0)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _as_root(*arguments: str) -> None:
    """Run `offload` as root; where that cannot be, the test fails: a skip would hide that nothing was tested."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "--non-interactive", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"]
    command = [*sudo, sys.executable, "-m", "offload_cli", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.fail(f"as root, run: offload {' '.join(arguments)}\n{done.stderr}", pytrace=False)
