"""Package lists that nobody uses any more are dropped."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from offloadd.builder.apt import drop_old_lists

DAY_S = 86400.0


def lists(root: Path, name: str, age_s: float) -> Path:
    folder = root / name
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "lists/mirror_Packages").write_text("Package: hello\n")
    (folder / "lock").touch()
    (folder / "updated").touch()
    then = time.time() - age_s
    os.utime(folder / "updated", (then, then))
    return folder


def test_old_ones_go_and_new_ones_stay(tmp_path: Path) -> None:
    old, new = lists(tmp_path, "old", 40 * DAY_S), lists(tmp_path, "new", DAY_S)
    (tmp_path / "never-updated").mkdir()
    drop_old_lists(tmp_path, 30 * DAY_S)
    assert not (old / "lists").exists()
    assert not (old / "updated").exists(), "who asks next updates first"
    assert (new / "lists/mirror_Packages").exists()
    drop_old_lists(tmp_path / "nothing", 0)


def test_who_uses_them_keeps_them(tmp_path: Path) -> None:
    folder = lists(tmp_path, "used", 40 * DAY_S)
    with (folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        drop_old_lists(tmp_path, 30 * DAY_S)
        assert (folder / "lists/mirror_Packages").exists()
    drop_old_lists(tmp_path, 30 * DAY_S)
    assert not (folder / "lists").exists()
