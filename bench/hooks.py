"""What a build hook's decision takes, the start of Python included."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.measure import BenchError, Budget, Row, Series, in_turn
from bench.workplace import Workplace
from offloadd.process import Progress
from offloadd.setup.wrapper import hook_program, wrapper

_REPOSITORY = Path(__file__).resolve().parent.parent
DECISION_S = 0.150
_DECIDER = "bench-decider"
"""A machine that nobody logs in to."""
_DECIDER_FILE = f"""\
kind: ssh
host: 127.0.0.1
user: offloading
host-key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKHEChAmnuOdZIZDsM9FyEcXaMpqYqj3i7qvLwiP7rJh
private-key: /nowhere
systems: [x86_64-linux]
features: [{_DECIDER}]
daemons: [guix, nix]
"""
# It says yes to whatever comes, as the real ones do in the end.
_REAL = "#!/bin/sh\necho '# accept' >&2\nexec cat >/dev/null\n"


def measure_decision(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """The rows for a hook that is started as a build daemon does, while our daemon has a machine that is free."""
    tell("the hooks' decision", None)
    place.add_file(_DECIDER, _DECIDER_FILE)
    place.run("machine", "list")
    real = place.folder / "real"
    real.write_text(_REAL)
    real.chmod(0o755)
    environment = place.env | {
        "OFFLOAD_GUIX": str(real),
        "OFFLOAD_NIX": str(real),
        "GUIX_CONFIGURATION_DIRECTORY": str(place.folder),
        "TMPDIR": str(place.folder),
    }
    ways = {
        "guix-hook": (["offload", "x86_64-linux", "3600", "false", "86400"], _guix_request()),
        "nix-hook": (["3"], _nix_request()),
    }
    commands = {}
    for name, (arguments, _) in ways.items():
        hook = place.folder / name
        hook.write_bytes(hook_text(place, name, sys.executable))
        hook.chmod(0o755)
        commands[name] = [str(hook), *arguments]
    series = {name: Series(f"offload {name}") for name in ways}
    for name, (_, request) in ways.items():
        _time_decision(commands[name], request, environment)  # compiles what has changed since the last time
    for number in budget.rounds():
        for name in in_turn(number, *ways):
            series[name].seconds.append(_time_decision(commands[name], ways[name][1], environment))
    compares = (
        "from the start of the hook to its `# accept`: Python, our daemon's answer, and a real program that accepts at once"
    )
    return [
        Row(name=f"decision of {name}", compares=compares, ours=times, relation="time", target=DECISION_S)
        for name, times in series.items()
    ]


def hook_text(place: Workplace, name: str, python: str) -> bytes:
    """The program that `offload guix setup` and `offload nix setup` write, for the daemon of `place`."""
    program = hook_program(name, python, _REPOSITORY / "cli/offload_cli/entry.py", _REPOSITORY / "offloadd")
    environment = {"OFFLOAD_SOCKET": str(place.paths.socket), "OFFLOAD_SOCKET_OWNER": str(os.geteuid())}
    return wrapper(program, environment, ["/nonexistent"])


def _time_decision(command: Sequence[str], request: bytes, environment: dict[str, str]) -> float:
    """Seconds from the start of a hook to its reply to `request`."""
    said = []
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request)
        process.stdin.flush()
        while line := process.stdout.readline():
            said.append(line)
            if line.startswith(b"# "):
                break
        took = time.perf_counter() - began
        process.stdin.close()
        process.stdout.read()
    if line != b"# accept\n":
        raise BenchError(f"{command[-1]}: the hook said {b''.join(said).decode(errors='replace')!r}")
    return took


def _guix_request() -> bytes:
    return f"1 x86_64-linux /gnu/store/x.drv {_DECIDER}\n".encode()


def _nix_request() -> bytes:
    """As many settings as Nix has."""

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)

    number = struct.Struct("<Q").pack
    settings = b"".join(number(1) + string(b"setting-%d" % index) + string(b"x" * 40) for index in range(200)) + number(0)
    derivation = string(b"x86_64-linux") + string(b"/nix/store/x.drv") + number(1) + string(_DECIDER.encode())
    return settings + string(b"try") + number(1) + derivation
