"""`--date auto`: what tells when a source was released, and what is not believed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from offloadd.builder import packed
from offloadd.builder.release_date import added_changelog, release_date_of_directory, release_date_of_sources
from offloadd.errors import NotFoundError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RELEASED = datetime(2019, 7, 28, 17, 4, 8, tzinfo=UTC)
CHANGED = datetime(2023, 3, 29, 19, 39, 41, tzinfo=UTC)
CHANGELOG = b"foo (1.0-1) unstable; urgency=low\n\n  * x\n\n -- A B <a@example.org>  Wed, 29 Mar 2023 21:39:41 +0200\n"


def at(moment: datetime) -> int:
    return int(moment.timestamp())


def make_tar(path: Path, files: dict[str, tuple[bytes, int]]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, (content, mtime) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(packers.get(path.suffix, bytes)(buffer.getvalue()))
    return path


def make_dsc(*files: Path) -> list[Path]:
    """A .dsc that lists `files`, and these."""
    lines = [f" {hashlib.sha256(file.read_bytes()).hexdigest()} {file.stat().st_size} {file.name}\n" for file in files]
    path = files[0].with_name("foo_1.0-1.dsc")
    path.write_text("Source: foo\nVersion: 1.0-1\nArchitecture: any\nChecksums-Sha256:\n" + "".join(lines))
    return [path, *files]


@pytest.mark.parametrize("name", ["foo-1.0.tar", "foo-1.0.tar.gz", "foo-1.0.tar.bz2", "foo-1.0.tar.xz"])
def test_newest_file_of_a_tarball(tmp_path: Path, name: str) -> None:
    path = make_tar(tmp_path / name, {"a": (b"x", at(RELEASED) - 5), "b": (b"y" * 100_000, at(RELEASED)), "c": (b"", 86400)})
    assert release_date_of_sources([path], now=NOW) == (RELEASED, f"the newest file in {name}")


def test_newest_of_several_archives(tmp_path: Path) -> None:
    old = make_tar(tmp_path / "old.tar.gz", {"a": (b"x", at(RELEASED) - 5)})
    new = make_tar(tmp_path / "new.tar.xz", {"a": (b"x", at(RELEASED))})
    text = tmp_path / "fix.patch"
    text.write_text("no archive")
    assert release_date_of_sources([old, text, new], now=NOW) == (RELEASED, "the newest file in new.tar.xz")


def test_zip(tmp_path: Path) -> None:
    path = tmp_path / "foo.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"more after the end record"
        archive.writestr(zipfile.ZipInfo("a", (2019, 7, 28, 17, 4, 8)), "x")
        archive.writestr(zipfile.ZipInfo("long" * 50, (1980, 1, 1, 0, 0, 0)), "x" * 1000)
    assert release_date_of_sources([path], now=NOW).date == RELEASED


@pytest.mark.parametrize("kind", ["debian.tar.xz", "native", "diff.gz"])
def test_changelog_of_a_debian_source(tmp_path: Path, kind: str) -> None:
    later = at(CHANGED) + 1000
    if kind == "native":
        files = [
            make_tar(tmp_path / "foo_1.0-1.tar.xz", {"foo-1.0/a": (b"", later), "foo-1.0/debian/changelog": (CHANGELOG, 1)})
        ]
    else:
        # What the upstream's own debian/ says is older and does not count.
        old = CHANGELOG.replace(b"2023", b"2013").replace(b"Wed", b"Fri")
        files = [make_tar(tmp_path / "foo_1.0.orig.tar.gz", {"foo/debian/changelog": (old, later)})]
        if kind == "diff.gz":
            diff = tmp_path / "foo_1.0-1.diff.gz"
            lines = b"".join(b"+" + line + b"\n" for line in CHANGELOG.splitlines())
            diff.write_bytes(
                gzip.compress(
                    b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n--- a/c\n+++ foo-1.0/debian/changelog\n@@ -0,0 @@\n" + lines
                )
            )
            files.append(diff)
        else:
            files.append(make_tar(tmp_path / "foo_1.0-1.debian.tar.xz", {"debian/changelog": (CHANGELOG, later)}))
    assert release_date_of_sources(make_dsc(*files), now=NOW) == (CHANGED, "debian/changelog of foo 1.0-1")


def test_changelog_from_the_future_is_not_believed(tmp_path: Path) -> None:
    files = make_dsc(make_tar(tmp_path / "foo_1.0-1.debian.tar.xz", {"debian/changelog": (CHANGELOG, at(RELEASED))}))
    found = release_date_of_sources(files, now=datetime(2023, 1, 1, tzinfo=UTC))
    assert found.date == RELEASED
    assert found.origin == (
        "the newest file in foo_1.0-1.debian.tar.xz (debian/changelog says 2023-03-29T19:39:41Z: not believed)"
    )


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        (0, "1970-01-01"),
        (315532800, "1980-01-01"),
        (at(NOW) + 1, "2026-01-01T00:00:01Z"),
        (499162500, "as npm writes everywhere"),
        (1580601600, "as hatchling writes everywhere"),
    ],
)
def test_file_times_that_are_not_believed(tmp_path: Path, moment: int, reason: str) -> None:
    path = make_tar(tmp_path / "a.tar.gz", {"a": (b"x", moment)})
    with pytest.raises(NotFoundError, match="no release date can be found") as caught:
        release_date_of_sources([path], now=NOW)
    assert reason in str(caught.value)
    assert "--date" in caught.value.hint
    path = make_tar(path, {"a": (b"x", moment), "b": (b"x", at(RELEASED))})
    assert release_date_of_sources([path], now=NOW).date == RELEASED


def test_nothing_fetched() -> None:
    with pytest.raises(NotFoundError):
        release_date_of_sources([], now=NOW)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.xz", "a.tar.bz2", "a.tar", "a.zip", "a.diff.gz", "a.dsc"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"PK\x05\x06" + b"\xff" * 18, lzma.compress(b"x" * 99)[:-5]])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(NotFoundError):
        release_date_of_sources([path], now=NOW)


def test_what_a_cut_off_tarball_still_tells(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {"a": (b"x", at(RELEASED)), "b": (b"y" * 5000, at(RELEASED))})
    path.write_bytes(path.read_bytes()[:3000])
    assert release_date_of_sources([path], now=NOW).date == RELEASED


def test_a_bomb_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MAX_UNPACKED_BYTES", 100_000)
    path = make_tar(tmp_path / "a.tar.xz", {"a": (bytes(1_000_000), at(RELEASED)), "b": (b"", at(RELEASED) + 1)})
    assert release_date_of_sources([path], now=NOW).date == RELEASED


def test_xz_that_asks_for_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tar(tmp_path / "a.tar.xz", {"a": (b"x", at(RELEASED))})
    monkeypatch.setattr(packed, "_XZ_MEMORY", 1 << 20)
    with pytest.raises(NotFoundError):
        release_date_of_sources([path], now=NOW)


def test_xz_of_several_streams(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {"a": (b"x" * 3000, at(RELEASED))})
    data = path.read_bytes()
    whole = tmp_path / "b.tar.xz"
    whole.write_bytes(lzma.compress(data[:700]) + bytes(8) + lzma.compress(data[700:]))
    with packed.open_unpacked(whole) as stream:
        assert stream.read() == data


def test_changelog_in_a_patch() -> None:
    other = b"+++ b/debian/changelog.old\n+wrong\n"
    wanted = b"--- x\n+++ b/debian/changelog\t2020\n@@ -0,0 +1 @@\n+one\n+\n+two\n"
    diff = other + wanted + b"--- y\n+++ b/z\n+no\n"
    assert added_changelog(io.BytesIO(diff)) == b"one\n\ntwo\n"


def test_changelog_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian/changelog").write_bytes(CHANGELOG)
    assert release_date_of_directory(tmp_path, now=NOW) == (CHANGED, "debian/changelog of foo 1.0-1")


def test_file_times_of_a_directory(tmp_path: Path) -> None:
    for name, moment in (("a", at(RELEASED)), ("b", at(RELEASED) - 9), (".git/x", at(CHANGED)), ("future", at(NOW) + 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (moment, moment))
    found = release_date_of_directory(tmp_path, now=NOW)
    assert found.date == RELEASED
    assert found.origin == "the newest file in the directory (a file in the directory says 2026-01-01T00:00:09Z: not believed)"


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        release_date_of_directory(tmp_path, now=NOW)
