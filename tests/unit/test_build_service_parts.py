"""The parts of the guest's build service that are pure functions, and that must agree with the standard library."""

import errno
import fnmatch
import io
import json
import os
import sys
import tarfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st


def load(name: str) -> ModuleType:
    folder = str(Path(__file__).parents[2] / "images/guest")
    sys.path.insert(0, folder)
    try:
        return import_module(f"build_service.{name}")
    finally:
        sys.path.remove(folder)


clock, disks, frames, outputs, patterns, source, steps = (
    load(name) for name in ("clock", "disks", "frames", "outputs", "patterns", "source", "steps")
)

texts = st.text(st.characters())
values = st.recursive(
    texts | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=10,
)


@given(values)
def test_json_is_json(value: object) -> None:
    assert json.loads(frames.to_json(value)) == value
    assert frames.parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["", "{", "{} {}", "nonsense", '{"a": }'])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises((frames.Trouble, ValueError)):
        frames.parse_json(text)


glob_texts = st.text("ab-.![]*?", max_size=8).map(str.encode)


@given(glob_texts, st.text("ab-.![", min_size=1, max_size=6).map(str.encode))
def test_patterns_match_as_fnmatch_has_it(pattern: bytes, name: bytes) -> None:
    hidden = name.startswith(b".") and not pattern.startswith(b".")
    if b"[" not in pattern:
        assert patterns.matches(name, pattern) == (fnmatch.fnmatchcase(name, pattern) and not hidden)
    assert patterns.matches(name, pattern) in (True, False)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.deb", "a.deb a.b.deb", "a.debx .deb .a.deb"),
        ("[a-c]x[!0-9]", "axz cx-", "dxz ax5 ax"),
        ("[]x]", "] x", "y []"),
        ("[x", "[x", "x"),
        ("a[b-]", "ab a-", "ac"),
        (".*", ".a", "a"),
        ("*a*b*c", "abc xaxbxc", "acb ab"),
    ],
)
def test_patterns(pattern: str, yes: str, no: str) -> None:
    assert [name for name in yes.split() if not patterns.matches(name.encode(), pattern.encode())] == []
    assert [name for name in no.split() if patterns.matches(name.encode(), pattern.encode())] == []


def test_a_pattern_with_many_stars_takes_no_time() -> None:
    assert not patterns.matches(b"a" * 200, b"*a" * 100 + b"b")


@given(st.binary(min_size=1, max_size=300), st.integers(0, 1 << 40), st.integers(-5, 1 << 40), st.binary(max_size=300))
def test_headers_are_read_by_tarfile(name: bytes, size: int, mtime: int, link: bytes) -> None:
    name = b"n" + name.translate(None, b"\0/")
    link = b"l" + link.translate(None, b"\0")
    for kind in (b"0", b"2"):
        data = outputs.tar_header(name, kind, 0o751, size if kind == b"0" else 0, mtime, link if kind == b"2" else b"")
        with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
            found = tar.next()
        assert found is not None
        assert found.name.encode("utf-8", "surrogateescape") == name
        assert (found.mode, found.type) == (0o751, kind)
        assert found.mtime == min(max(mtime, 0), 8**11 - 1)
        if kind == b"0":
            assert found.size == size
        else:
            assert found.linkname.encode("utf-8", "surrogateescape") == link


@given(st.integers(0, (1 << 60) - 1))
def test_numbers_of_both_kinds(number: int) -> None:
    assert source.tar_number(tarfile.itn(number, 12, tarfile.GNU_FORMAT)) == number  # type: ignore[attr-defined]


def test_the_sandbox_s_command_line() -> None:
    begin = {"build": "b1", "directory": "/build/x-1", "env": {"LANG": "C", "A": "1 2"}, "network": False}
    words = steps.sandbox_arguments(begin, 61184, "make; echo $A", 7)
    assert words[:2] == ["/usr/bin/bwrap", "--unshare-all"]
    assert words[-5:] == ["--", "/bin/sh", "-e", "-c", "make; echo $A"]
    assert "--share-net" not in words
    assert {"--die-with-parent", "--new-session", "--clearenv"} < set(words)
    assert words[words.index("--bind") + 1 :][:2] == ["/tmp", "/"]
    assert words[words.index("--uid") + 1 :][:3] == ["1000", "--gid", "1000"]
    assert words[words.index("--chdir") + 1] == "/build/x-1"
    env = {words[at + 1]: words[at + 2] for at, word in enumerate(words) if word == "--setenv"}
    assert env["LANG"] == "C"
    assert env["A"] == "1 2"
    assert env["OFFLOAD_BUILD"] == "b1"
    assert "--share-net" in steps.sandbox_arguments({**begin, "network": True}, 61184, "true", 7)


def test_the_sandbox_of_a_service_that_is_no_root() -> None:
    """All files are that user's, but a build can write no more than elsewhere."""
    begin = {"build": "b1", "directory": "/build/x-1", "env": {}, "network": False}
    words = steps.sandbox_arguments(begin, None, "true", 7)
    assert words[words.index("--ro-bind") + 1 :][:2] == ["/tmp", "/"]
    bound = [words[at + 2] for at, word in enumerate(words) if word == "--bind"]
    assert bound == ["/build", "/tmp", "/var/tmp"]


def test_a_disk_is_found_by_its_serial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "TIMEOUT_S", 0.05)
    block = tmp_path / "block"
    # "null" is a device that every host has; a SCSI disk has its serial on a page with a header.
    for name, file, content in (("other", "serial", b"env-1"), ("null", "device/vpd_pg80", b"\0\x80\0\x05env-1")):
        (block / name / file).parent.mkdir(parents=True, exist_ok=True)
        (block / name / file).write_bytes(content)
    (block / "without").mkdir()
    assert disks.find_disk(str(tmp_path), "env-1") == "/dev/null"
    with pytest.raises(frames.Trouble, match="no disk env-2 came"):
        disks.find_disk(str(tmp_path), "env-2")
    (block / "null/serial").write_bytes(b"env-2\n")
    assert disks.find_disk(str(tmp_path), "env-2") == "/dev/null"


class OldSystem:
    """The clock functions of a system that has run for a while, and stands still whenever it was asked how long."""

    CLOCK_REALTIME = 0

    def __init__(self, *pauses: float) -> None:
        self.age = 5.0
        self.shown = 0.0
        self.tries = 0
        self._pauses = list(pauses)

    def monotonic(self) -> float:
        told = self.age
        self.age += self._pauses.pop(0) if self._pauses else 0.0001
        return told

    def clock_settime(self, clock_id: int, moment: float) -> None:
        self.tries += 1
        if moment < self.age:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.shown = moment


@pytest.mark.parametrize(("pauses", "tries"), [([], 1), ([0.02], 2), ([0.02, 0.1, 3.0, 0.2], 4)])
def test_a_clock_is_set_to_1970_however_slow_the_guest_is(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], tries: int
) -> None:
    system = OldSystem(*pauses)
    monkeypatch.setattr(clock, "time", system)
    clock.set_clock(0)
    assert system.tries == tries
    assert system.age <= system.shown < system.age + 3


def test_a_clock_is_set_to_a_date_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    system = OldSystem(0.02)
    monkeypatch.setattr(clock, "time", system)
    clock.set_clock(1_000_000_000.5)
    assert (system.shown, system.tries) == (1_000_000_000.5, 1)


@pytest.mark.parametrize(("date", "error"), [(0, errno.EPERM), (0, errno.EINVAL), (1e300, errno.EINVAL)])
def test_a_clock_that_cannot_be_set(monkeypatch: pytest.MonkeyPatch, date: float, error: int) -> None:
    system = OldSystem()

    def refuse(clock_id: int, moment: float) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(clock, "time", system)
    monkeypatch.setattr(system, "clock_settime", refuse)
    with pytest.raises(OSError, match=os.strerror(error)):
        clock.set_clock(date)
