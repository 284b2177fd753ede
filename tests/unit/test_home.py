"""Where the logs of an instance's runs go."""

from __future__ import annotations

import os
from pathlib import Path

from offloadd.vm.home import KEPT_LOGS, log_folder


def test_the_logs_of_the_oldest_runs_make_room(tmp_path: Path) -> None:
    runs = tmp_path / "m"
    assert log_folder(runs).parent == runs
    assert not runs.exists()
    for number in range(KEPT_LOGS + 5):
        for kind in ("", "-template"):
            folder = runs / f"20260101T0000{number:02}Z{kind}"
            folder.mkdir(parents=True)
            (folder / "console.log").touch()
            os.utime(folder, (number, number))
    plain = log_folder(runs)
    assert plain.name.endswith("Z")
    left = sorted(folder.name for folder in runs.iterdir())
    assert [name for name in left if name.endswith("Z")] == [f"20260101T0000{number:02}Z" for number in range(6, 15)]
    # Templates are made beside: they do not push out what a machine's user may look for.
    assert len([name for name in left if name.endswith("-template")]) == KEPT_LOGS + 5
    assert log_folder(runs, "-template").name.endswith("Z-template")
    assert len(list(runs.glob("*-template"))) == len(list(runs.glob("*Z"))) == KEPT_LOGS - 1
