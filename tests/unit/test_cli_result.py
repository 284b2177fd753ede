"""The directory that gets what a build gave."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from offload_cli.result import check_out, default_out, keep_result
from offloadd.errors import ProtocolError, UsageError

RESULT = {"build": "0a1b2c3d", "state": "succeeded"}


class FakeClient:
    """Has the outputs `files`, or `raw` bytes, or none."""

    def __init__(self, files: dict[str, bytes] | None = None, raw: bytes | None = None) -> None:
        self.files, self.raw = files, raw

    def fetch_outputs(self, build: str, target: Path) -> bool:
        if self.raw is not None:
            target.write_bytes(self.raw)
        elif self.files is not None:
            with tarfile.open(target, "w") as tar:
                for name, content in self.files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return self.raw is not None or self.files is not None


def keep(client: FakeClient, target: Path, outputs: str | None = "") -> Any:
    log = io.BytesIO(b"the log\n")
    return keep_result(client, target, "0a1b2c3d", RESULT, log, outputs=outputs)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def test_new_and_empty_and_ours_are_taken(source: Path) -> None:
    out = Path("out")
    assert check_out(out, source) == Path.cwd() / "out"
    out.mkdir()
    assert check_out(out, source) == Path.cwd() / "out"
    keep(FakeClient(), out.resolve())
    assert check_out(out, source) == Path.cwd() / "out"
    assert check_out(source / "result", source) == source / "result"


def test_what_is_not_ours_is_refused(source: Path) -> None:
    out = Path("out")
    out.mkdir()
    (out / "build.json").write_text('{"name": "some other build.json"}')
    with pytest.raises(UsageError, match="not empty"):
        check_out(out, source)


@pytest.mark.parametrize("place", ["source", "parent of source", "here", "parent of here", "file", "link to source"])
def test_places_that_would_be_lost(source: Path, place: str) -> None:
    (source / "file").touch()
    link = source.parent / "link"
    link.symlink_to(source)
    here = Path.cwd()
    places = {"source": source, "parent of source": source.parent, "here": Path(), "parent of here": here.parent}
    with pytest.raises(UsageError):
        check_out((places | {"file": source / "file", "link to source": link})[place], source)


def test_outputs_and_record(tmp_path: Path) -> None:
    kept = keep(FakeClient({"dist/x": b"12345"}), tmp_path / "out")
    assert (kept.files, kept.size) == (1, 5)
    assert (tmp_path / "out/dist/x").read_bytes() == b"12345"
    assert json.loads((tmp_path / "out/build.json").read_text()) == RESULT
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_record_is_ours(tmp_path: Path) -> None:
    keep(FakeClient({"build.json": b"forged"}), tmp_path / "out")
    assert json.loads((tmp_path / "out/build.json").read_text()) == RESULT


def test_an_earlier_result_is_replaced_as_a_whole(tmp_path: Path) -> None:
    keep(FakeClient({"old": b""}), tmp_path / "out")
    keep(FakeClient({"new": b""}), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["build.json", "build.log", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refused_outputs_leave_the_earlier_result(tmp_path: Path) -> None:
    keep(FakeClient({"old": b""}), tmp_path / "out")
    with pytest.raises(ProtocolError):
        keep(FakeClient(raw=b"not a tar" * 100), tmp_path / "out")
    assert (tmp_path / "out/old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_build_directory_has_its_own_place(tmp_path: Path) -> None:
    keep(FakeClient({"a": b""}), tmp_path / "out", outputs="failed")
    assert (tmp_path / "out/failed/a").exists()


def test_outputs_that_are_not_wanted(tmp_path: Path) -> None:
    keep(FakeClient({"a": b""}), tmp_path / "out", outputs=None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["build.json", "build.log"]


def test_the_log_does_not_replace_an_output(tmp_path: Path) -> None:
    keep(FakeClient({"a": b""}), tmp_path / "out")
    assert (tmp_path / "out/build.log").read_bytes() == b"the log\n"
    keep(FakeClient({"build.log": b"the package's own"}), tmp_path / "out")
    assert (tmp_path / "out/build.log").read_bytes() == b"the package's own"


def test_links_that_came_with_the_source_do_not_lead_the_result_away(source: Path, tmp_path: Path) -> None:
    assert default_out("hello-1") == Path("offload-out/hello-1")
    outside = tmp_path / "home" / "autostart"
    Path("offload-out").mkdir()
    Path("offload-out/hello-1").symlink_to(outside)
    with pytest.raises(UsageError, match="is a link"):
        default_out("hello-1")
    Path("offload-out/hello-1").unlink()
    Path("offload-out").rmdir()
    Path("offload-out").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a link"):
        default_out("hello-1")
    # A user's own word for a place is another thing.
    assert check_out(Path("offload-out/hello-1"), source) == tmp_path / "hello-1"


def test_a_record_that_came_with_the_source_is_not_read_for_ever(source: Path) -> None:
    out = Path("out")
    out.mkdir()
    record = out / "build.json"
    os.mkfifo(record)
    with pytest.raises(UsageError, match="not empty"):
        check_out(out, source)
    record.unlink()
    record.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="not empty"):
        check_out(out, source)
    record.unlink()
    record.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="not empty"):
        check_out(out, source)


def test_a_place_that_cannot_hold_the_result(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be made in .*/file"):
        check_out(tmp_path / "file/out", source)
