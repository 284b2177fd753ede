"""Where the measurements happen: a daemon of our own, with one machine, that touches nothing of the user's but the cache.

State, configuration and sockets lie in a directory that is thrown away.  The cache is the user's, so that not every run makes
an image first; the image is only made to be measured in a cache of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import BenchError, time_program
from offloadd.paths import Paths, find_paths, make_private

MACHINE = "bench-vm"
_WARM_WAITS = re.compile(r"a clone waits.*kind='?warm")
OTHER_DATE = "2018-06-01"
"""Of a build that gets a VM of its own."""
_MACHINE = """\
kind: build-vm
image: debian
port-forwardings: {{{ssh}: 22, {secrets}: 1004}}
"""
_ONE_LINE = """\
name: one-line
version: "1"
steps: ["true"]
"""
_STOP_LIMIT_S = 90


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """One daemon's own corner."""

    folder: Path
    paths: Paths
    env: dict[str, str]
    offload: tuple[str, ...]
    """How `offload` is called."""

    def run(self, *arguments: str, limit_s: float = 300) -> float:
        """Seconds that one `offload` takes, as its user waits for it. Raises BenchError when it fails."""
        return time_program([*self.offload, *arguments], env=self.env, cwd=self.folder, limit_s=limit_s)

    def build(self, *options: str, machine: str = MACHINE, out: str = "out") -> float:
        """The same for `offload build` of a one-line recipe."""
        return self.run("build", "--machine", machine, "-o", str(self.folder / out), *options, str(self.folder / "one-line"))

    def add_machine(self, name: str, more: str = "") -> None:
        """Declare a build-vm with free ports, and further lines of YAML."""
        ssh, secrets = free_ports()
        self.add_file(name, _MACHINE.format(ssh=ssh, secrets=secrets) + more)

    def add_file(self, name: str, text: str) -> None:
        """Declare any machine: the rest of its file."""
        (self.paths.config / "machines" / f"{name}.yaml").write_text(f"name: {name}\n{text}")

    def wait_for_clone(self, count: int, limit_s: float = 60) -> None:
        """Wait until the daemon's log has told of so many clones that wait warm.  Raises BenchError when it does not."""
        deadline = time.monotonic() + limit_s
        while len(_WARM_WAITS.findall(self.paths.daemon_log.read_text())) < count:
            if time.monotonic() > deadline:
                raise BenchError(f"no warm clone waits after {limit_s:.0f} s")
            time.sleep(0.1)

    def ask(self, *arguments: str) -> Any:
        """What a reading command says with `--json`. Raises BenchError when it fails."""
        argv = [*self.offload, *arguments, "--json"]
        done = subprocess.run(argv, env=self.env, cwd=self.folder, capture_output=True, timeout=120)
        if done.returncode:
            raise BenchError(f"offload {' '.join(arguments)}: {done.stderr.decode(errors='replace')}")
        return json.loads(done.stdout)


@contextmanager
def open_workplace(*, empty_cache: bool = False) -> Iterator[Workplace]:
    """A workplace; no daemon and no machine of it is left when the block ends.

    Args:
        empty_cache: use a new cache, on the disk where the user's is, and throw it away.
    """
    user = find_paths()
    cache = make_private(user.cache)
    with tempfile.TemporaryDirectory(prefix="offload-bench-") as name:
        folder = Path(name)
        if empty_cache:
            cache = Path(tempfile.mkdtemp(prefix="bench-", dir=cache)) / "offload"
        place = _workplace(folder, cache)
        _write_files(place)
        if empty_cache and user.accelerator.exists():
            # Probing KVM takes seconds where it does not work; the daemon checks whether the verdict still holds.
            shutil.copy(user.accelerator, make_private(place.paths.cache))
        try:
            yield place
        finally:
            _end_daemon(place)
            if empty_cache:
                shutil.rmtree(cache.parent)


def _workplace(folder: Path, cache: Path) -> Workplace:
    home = {"XDG_CONFIG_HOME": "config", "XDG_STATE_HOME": "state", "XDG_RUNTIME_DIR": "run"}
    env = os.environ | {variable: str(folder / part) for variable, part in home.items()}
    # Else each start of ours would compile what it imports.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    config, state, runtime = (folder / part / "offload" for part in home.values())
    script = Path(sys.executable).with_name("offload")
    return Workplace(
        folder=folder,
        paths=Paths(config=config, state=state, runtime=runtime, cache=cache),
        env=env | {"XDG_CACHE_HOME": str(cache.parent)},
        offload=(str(script),) if script.exists() else (sys.executable, "-m", "offload_cli"),
    )


def _write_files(place: Workplace) -> None:
    machines, project = place.paths.config / "machines", place.folder / "one-line"
    for folder in (machines, project):
        folder.mkdir(parents=True)
    make_private(place.paths.runtime)
    place.add_machine(MACHINE)
    (project / "offload.yaml").write_text(_ONE_LINE)


def free_ports() -> tuple[int, int]:
    """Two TCP ports that nobody listens on."""
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def _end_daemon(place: Workplace) -> None:
    """Stop the daemon, which ends its machines, and wait until it is gone."""
    if place.paths.socket.exists():
        place.run("daemon", "stop", limit_s=_STOP_LIMIT_S)
    left = [path.parent.name for path in place.paths.instances.glob("*/instance.json")]
    if left:
        raise BenchError(f"left running: {', '.join(left)}")
