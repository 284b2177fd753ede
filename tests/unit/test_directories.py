"""Where our directories are, by the environment."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from offloadd.directories import base_directory, runtime_directory
from offloadd.hook import ask
from offloadd.paths import find_paths


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    for name in ("CONFIG_HOME", "STATE_HOME", "CACHE_HOME", "RUNTIME_DIR"):
        monkeypatch.delenv(f"XDG_{name}", raising=False)


def test_defaults_are_below_the_home_directory() -> None:
    paths = find_paths()
    assert paths.config == Path("/home/ada/.config/offload")
    assert paths.cache == Path("/home/ada/.cache/offload")
    assert paths.socket == Path("/home/ada/.local/state/offload/run/offloadd.sock")


@pytest.mark.parametrize(
    ("value", "expected"), [("/x/y", "/x/y/offload"), ("x", "/home/ada/.c/offload"), ("", "/home/ada/.c/offload")]
)
def test_relative_ones_are_ignored(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert base_directory("XDG_CACHE_HOME", ".c") == expected


def test_the_runtime_directory_is_below_the_state_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    assert runtime_directory() == "/s/offload/run"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert runtime_directory() == "/run/user/7/offload"


def test_a_user_without_a_home_directory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(FileNotFoundError, match="no home directory"):
        runtime_directory()


def test_without_a_home_directory_there_is_no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> str:
        raise FileNotFoundError(errno.ENOENT, "has no home directory", "user 54321")

    monkeypatch.delenv("OFFLOAD_SOCKET", raising=False)
    monkeypatch.setattr(ask, "runtime_directory", homeless)
    with pytest.raises(ask.Unanswered, match="user 54321 has no home directory") as caught:
        ask.ask("guix", "x86_64-linux", [], local=True, keys={})
    assert caught.value.absent
