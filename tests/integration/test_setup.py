"""The programs that a setup writes for build daemons, run as these do; and what it tells whoever runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offloadd.setup.wrapper import Program, real_program, wrapper

from ..conftest import REPOSITORY, World

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGDUWqWvjZ8mn1ruZdXVGbcc3SCRYjO9wqK1TGxHvEB1"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C"}
"""A build daemon's."""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def output(*argv: str | Path, **options: object) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=True, **{"env": ENVIRONMENT, **options})  # type: ignore[call-overload]
    return str(done.stdout)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Where every user can come."""
    root = Path(tempfile.mkdtemp(prefix="offload-setup-", dir="/tmp"))
    root.chmod(0o755)
    yield root
    shutil.rmtree(root)


def test_a_wrapper_quotes(tmp_path: Path) -> None:
    program = Program(argv=["printf", "%s.", "it's $HOME"], executables=["/bin/sh"])
    hook = tmp_path / "hook"
    hook.write_bytes(wrapper(program, {"A": "x'y"}, ["false"]))
    hook.chmod(0o755)
    assert output(hook, "a b", "") == "it's $HOME.a b.."


def test_without_ours_a_wrapper_is_the_real_program(open_folder: Path) -> None:
    ours = script(open_folder / "private/offload", 'echo ours "$OFFLOAD_SOCKET" "$@"')
    source = open_folder / "private/source.py"
    source.touch()
    real = script(open_folder / "it's guix", 'echo real "${OFFLOAD_SOCKET-none}" "$@"')
    program = Program(argv=[str(ours)], executables=[str(ours)], sources=[str(source)])
    hook = open_folder / "hook"
    hook.write_bytes(wrapper(program, {"OFFLOAD_SOCKET": "s"}, [str(real), "and"]))
    hook.chmod(0o755)
    assert output(hook, "authenticate", "a  b") == "ours s authenticate a  b\n"
    if os.geteuid() == 0:
        # It is there, and guix-daemon's user has no way to it.
        ours.parent.chmod(0o700)
        assert output(hook, "authenticate", "a  b", user=64_123, cwd="/") == "real none and authenticate a  b\n"
    source.rename(open_folder / "away")
    assert output(hook, "substitute") == "real none and substitute\n"
    (open_folder / "away").rename(source)
    ours.chmod(0o644)
    assert output(hook, "substitute") == "real none and substitute\n"
    ours.unlink()
    assert output(hook, "substitute") == "real none and substitute\n"


def test_the_real_program_is_not_our_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = script(tmp_path / "hook", "")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/guix-of-tests").symlink_to(hook)
    monkeypatch.setenv("PATH", f"{tmp_path}/one:{tmp_path}/two")
    assert real_program("guix-of-tests", hook) == "guix-of-tests"
    real = script(tmp_path / "two/guix-of-tests", "")
    assert real_program("guix-of-tests", hook) == str(real)


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> World:
    made = make_world()
    folder = made.root / "config/offload/machines"
    folder.mkdir(parents=True)
    (made.root / "key").write_text("the secret\n")
    (folder / "tower.yaml").write_text(
        f"kind: ssh\nname: tower\nhost: 127.0.0.1\nport: 9\nhost-key: {KEY}\nprivate-key: {made.root}/key\n"
        "systems: [x86_64-linux]\ndaemons: [guix, nix]\n"
    )
    return made


@pytest.mark.parametrize("daemon", ["guix", "nix"])
def test_what_a_restart_is_needed_for_is_told(world: World, daemon: str) -> None:
    etc = world.root / f"told/{daemon}"
    assert "restart" in world.run(daemon, "setup", "--directory", etc).stderr
    assert "restart" not in world.run(daemon, "setup", "--directory", etc, "--undo", "--dry-run").stderr
    told = world.run(daemon, "setup", "--directory", etc, "--undo").stderr
    assert f"restart {daemon}-daemon, if one runs: until then it looks for {etc}/offload/hook, which is gone" in told
    assert "restart" not in world.run(daemon, "setup", "--directory", etc, "--undo").stderr


def test_with_a_drop_in_systemd_is_told_first(capsys: pytest.CaptureFixture[str]) -> None:
    from offload_cli.guix_setup import _tell_of_restart
    from offloadd.setup.guix import DROP_IN

    hook = Path("/etc/guix/offload/hook")
    _tell_of_restart("guix", [hook, DROP_IN], hook)
    assert "systemctl daemon-reload && systemctl restart guix-daemon" in capsys.readouterr().err


def test_the_real_guix_gets_nothing_of_whoever_set_it_up(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches and modules would be looked for where its user cannot come."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY}/cli")
    etc = tmp_path / "etc"
    world.run("guix", "setup", "--directory", etc)
    script(tmp_path / "bin/guix", "env")
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "GUIX": str(etc / "offload/hook"), "LC_CTYPE": "C.UTF-8"}
    found = dict(line.split("=", 1) for line in output(etc / "offload/hook", "substitute", env=environment).splitlines())
    socket = {"OFFLOAD_SOCKET": str(world.root / "run/offload/offloadd.sock"), "OFFLOAD_SOCKET_OWNER": str(os.geteuid())}
    assert {name: found[name] for name in found.keys() - {"PWD", "SHLVL", "_"}} == environment | socket
