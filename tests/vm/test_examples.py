"""The examples, built in real VMs at a date that works and at dates that do not."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, World

EXAMPLES = REPOSITORY / "examples"


def test_time_trap_passes_in_its_time(world: World, tmp_path: Path) -> None:
    done = world.run("build", "--date", "2020-06-01", "-o", tmp_path / "out", EXAMPLES / "time-trap")

    assert "Ran 3 tests" in done.stdout
    assert (tmp_path / "out/dist/time-trap-1.0.zip").stat().st_size > 1000
    record = json.loads((tmp_path / "out/build.json").read_text())
    assert record["state"] == "succeeded"
    assert record["date"] == "2020-06-01T00:00:00Z"
    assert record["cpu"] == "Cascadelake-Server"
    assert "Cascadelake" in record["cpu_in_guest"]
    assert record["accelerator"] in ("tcg", "kvm")
    assert record["machine"] == "build-vm"
    assert len(record["image_digest"]) == 64
    # The clock is set right before the first step.
    assert abs(record["clock"] - 1590969600) < 10
    world.assert_nothing_left()


@pytest.mark.parametrize(
    ("date", "reason"), [("now", "certificate has expired"), ("2018-06-01", "certificate is not yet valid")]
)
def test_time_trap_fails_outside_its_time(world: World, tmp_path: Path, date: str, reason: str) -> None:
    done = world.run("build", "--date", date, "-o", tmp_path / "out", EXAMPLES / "time-trap", status=1)

    assert reason in done.stdout
    assert "step 1 of 2 failed with exit status 1" in done.stderr
    assert json.loads((tmp_path / "out/build.json").read_text())["state"] == "failed"
    assert not (tmp_path / "out/dist").exists()


def test_holidays_passes_in_2019_and_fails_on_new_years_day_of_2020(world: World, tmp_path: Path) -> None:
    # Side by side: each uses one core.
    world.machine("pair", "parallel-builds: 2\nport-forwardings: {12722: 22}\n")
    options = ("build", "--machine", "pair")
    with ThreadPoolExecutor() as pool:
        passes = pool.submit(world.run, *options, "-o", tmp_path / "out", EXAMPLES / "holidays")
        fails = pool.submit(
            world.run, *options, "--date", "2020-01-01", "-o", tmp_path / "late", EXAMPLES / "holidays", status=1
        )

    assert "Ran 456 tests" in passes.result().stdout
    assert list((tmp_path / "out").rglob("holidays-0.9.11*.whl"))
    assert "FAILED (failures=3)" in fails.result().stdout
