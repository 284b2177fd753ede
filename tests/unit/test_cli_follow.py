"""Events as they are shown, phases where there is no terminal, and the command line of ssh."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from offload_cli.follow import follow
from offload_cli.phases import PlainPhases
from offload_cli.ssh import known_hosts_text, ssh_argv
from offload_cli.terminal import LogStream
from offloadd.errors import DaemonError

END: dict[str, Any] = {"event": "end", "state": "failed", "exit_status": 1, "result": {"build": "x"}}


def test_events(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    events: list[dict[str, Any]] = [
        {"event": "state", "state": "booting", "machine": "vm"},
        {"event": "phase", "text": "booting", "fraction": None},
        {"event": "phase", "text": "booting", "fraction": None},
        {"event": "step", "index": 1, "count": 2, "command": "make\n  check"},
        {"event": "log", "text": "raw \x1b[2J "},
        {"event": "log", "text": "text\n"},
        {"event": "from a later version"},
        {"event": "state", "state": "collecting", "machine": "vm"},
        {"event": "error", "what": "x"},
        END,
    ]
    ended = follow(events, PlainPhases(), LogStream())
    out, err = capfdbinary.readouterr()
    assert (ended.state, ended.exit_status, ended.result) == ("failed", 1, {"build": "x"})
    assert out == b"raw \x1b[2J text\n"
    assert err.decode().splitlines() == ["==> booting", "==> [1/2] make ...", "==> collecting the outputs"]


def test_events_without_an_end() -> None:
    with pytest.raises(DaemonError, match="ended during the build"):
        follow([{"event": "phase", "text": "booting", "fraction": None}], PlainPhases(), LogStream())


def test_plain_phases_do_not_repeat_themselves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = iter(range(0, 1000, 1))
    monkeypatch.setattr("offload_cli.phases.time.monotonic", lambda: float(next(times)))
    phases = PlainPhases()
    for size in range(10):
        phases.tell(f"sending the source ({size}.5 MiB)", None)
    for package in range(20):
        phases.tell(f"unpacking package-{package}", package / 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "==> sending the source (0.5 MiB)"
    assert lines[1] == "==> unpacking package-0 (0%)"
    assert 4 <= len(lines) <= 7


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_log_on_a_terminal_is_cleaned_and_leaves_it_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", Terminal(written))
    log = LogStream()
    for piece in ("\x1b[31mred\x1b", "[2J and", " open"):
        log.write(piece)
    log.end()
    assert written.getvalue() == b"\x1b[31mred and open\x1b[0m\n"


def test_a_terminal_that_is_gone_is_an_error_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, _: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stdout", Terminal(io.BufferedWriter(Gone())))
    with pytest.raises(OSError, match="Input/output error"):
        LogStream().write("nobody reads this")


MACHINE = {"name": "vm", "ssh_port": 11022, "client_key": "/s/id"}


def test_ssh_argv() -> None:
    argv = ssh_argv(MACHINE, Path("/run dir/known"), options=["-T"], words=["echo 'a b'"])
    assert argv[0] == "ssh"
    assert argv[-3:] == ["--", "offloading@127.0.0.1", "echo 'a b'"]
    assert 'UserKnownHostsFile="/run dir/known"' in argv
    assert "HostKeyAlias=vm" in argv
    assert "StrictHostKeyChecking=yes" in argv


def test_known_hosts_has_the_keys_under_the_machines_name() -> None:
    assert known_hosts_text("vm", ["ssh-ed25519 AAAA a comment", "ecdsa BBBB"]) == "vm ssh-ed25519 AAAA\nvm ecdsa BBBB\n"
