"""A build in a VM whose source and outputs are too much for frames, and one whose are not."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import World

MOMENT = 1_500_000_000


def digests(folder: Path) -> dict[str, str]:
    """Of every file below `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "build.json").read_text())
    return found


def make_source(folder: Path) -> None:
    """3,000 small files, and one of 10 MiB."""
    numbers = random.Random(4)
    for number in range(3000):
        path = folder / f"d{number % 60}/file-{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(numbers.randbytes(numbers.randrange(2000)))
        path.chmod(0o755 if number % 7 == 0 else 0o640)
        os.utime(path, (MOMENT + number, MOMENT + number))
    (folder / "big").write_bytes(numbers.randbytes(10 << 20))
    (folder / "hard").hardlink_to(folder / "big")
    (folder / "soft").symlink_to("d1/file-1")


STEPS = [
    "test $(stat -c %u:%g:%Y .) = 1000:1000:1546300800 && test $(stat -c %u:%a:%h hard) = 1000:644:2",
    'test $(stat -c %Y big) = 1546300800 && test "$(cat soft | sha256sum)" = "$(cat d1/file-1 | sha256sum)"',
    # mv takes rename(2) where it can; what it copies has another inode.
    "before=$(stat -c %i d2) && mv d2 renamed && test $(stat -c %i renamed) = $before && test ! -e d2",
    "echo more >> hard && test $(stat -c %s big) = 10485765 && rm -r d3 && chmod 600 d4/file-4 && touch -d @99 d4/file-64",
    "mkdir new && seq 100000 > new/numbers && ln -s ../big new/link",
]


@pytest.mark.parametrize("keep", [False, True], ids=["own", "running"])
def test_much_goes_by_disk(world: World, tmp_path: Path, keep: bool) -> None:
    machine = "bulky" if keep else "build-vm"
    recipe = world.recipe(f"bulk-{machine}", f"steps: {json.dumps(STEPS)}\noutputs: ['**']\n")
    make_source(recipe)
    asked = ["--machine", machine]
    if keep:
        world.machine("bulky", "cpu-count: 2\nmemory-size: 512\ndate: 2019-01-01\nport-forwardings: {13322: 22}\n")
        world.run("vm", "start", "bulky")
        # A running machine's clock goes on: these are not the same at every try.
        recipe.joinpath("offload.yaml").write_text(f"name: bulk\nsteps: {json.dumps(STEPS[2:])}\noutputs: ['**']\n")
    else:
        asked += ["--date", "2019-01-01"]
    expected = digests(recipe)

    try:
        for attempt in range(2 if keep else 1):
            out = tmp_path / f"out-{attempt}"
            done = world.run("build", *asked, "-o", out, recipe)
            assert "==> sending the source as a disk (" in done.stderr
            check_outputs(out, expected)
        if keep:
            mounts = world.run("vm", "exec", "bulky", "--", "cat", "/proc/mounts").stdout
            assert "squashfs" not in mounts
            assert "overlay" not in mounts
            # QEMU has let go of the files, which have no names any more.
            (qemu,) = world.qemus()
            assert not [link for link in open_files(qemu) if f"{world.root}/state/offload/builds" in link]
    finally:
        if keep:
            world.run("vm", "stop", "bulky")
    world.assert_nothing_left()


def open_files(pid: int) -> list[str]:
    return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]


def check_outputs(out: Path, sent: dict[str, str]) -> None:
    about = record(out)
    assert (about["source_channel"], about["outputs_channel"]) == ("disk", "disk")
    got = digests(out)
    grown = hashlib.sha256((out / "big").read_bytes()[: 10 << 20] + b"more\n").hexdigest()
    assert hashlib.sha256((out / "big").read_bytes()[: 10 << 20]).hexdigest() == sent["big"]
    for name, digest in sent.items():
        first, _, rest = name.partition("/")
        if first == "d3":
            assert name not in got
        else:
            wanted = grown if name in ("big", "hard") else digest
            assert got[f"renamed/{rest}" if first == "d2" else name] == wanted
    assert (out / "new/numbers").read_text().splitlines()[-1] == "100000"
    assert (out / "new/link").readlink() == Path("../big")
    assert (out / "soft").readlink() == Path("d1/file-1")
    assert not (out / "d2").exists()
    about_4, about_64, about_7 = (out / "d4" / f"file-{number}" for number in (4, 64, 784))
    assert about_4.stat().st_mode & 0o777 == 0o600
    assert about_64.stat().st_mtime == 99
    assert (about_7.stat().st_mtime, about_7.stat().st_mode & 0o777) == (MOMENT + 784, 0o755)


def test_little_goes_in_frames(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("little", "steps: ['cat input > output']\noutputs: [output]\n")
    (recipe / "input").write_bytes(random.Random(5).randbytes(7 << 20))

    world.run("build", "--machine", "build-vm", "-o", tmp_path / "out", recipe)

    about = record(tmp_path / "out")
    assert (about["source_channel"], about["outputs_channel"]) == ("frames", "frames")
    assert (tmp_path / "out/output").read_bytes() == (recipe / "input").read_bytes()
    world.assert_nothing_left()
