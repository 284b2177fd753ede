"""What a hostile host says of itself, and the programs that are sent there."""

from __future__ import annotations

import ast
import io
import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offloadd.errors import OffloadError, ProtocolError
from offloadd.paths import shipped
from offloadd.place import far_side
from offloadd.place.probe import (
    OLDEST_PYTHON,
    far_side_command,
    far_side_error,
    far_side_program,
    format_offset,
    parse_probe,
    probe_local,
)
from offloadd.place.remote import pack_service

NOW = 1_800_000_000.0
SAID: dict[str, Any] = {
    "load": 3.0,
    "cores": 4,
    "memory_mib": 2048,
    "disk_free": 10 << 30,
    "kernel": "6.1.0",
    "machine": "x86_64",
    "python": [3, 11],
    "sandbox": "",
    "time": NOW + 0.25,
}


def said(**changes: Any) -> bytes:
    return json.dumps(SAID | changes).encode()


def test_what_a_good_host_says() -> None:
    probe = parse_probe(said(), NOW, "tower")
    assert (probe.load, probe.cores, probe.memory_mib, probe.disk_free) == (0.75, 4, 2048, 10 << 30)
    assert (probe.kernel, probe.machine, probe.python) == ("6.1.0", "x86_64", "3.11")
    assert probe.clock_offset_s == 0.25
    assert probe.fault == ""


@pytest.mark.parametrize("name", sorted(SAID.keys() - {"python"}))
@pytest.mark.parametrize(
    "value",
    [None, [], {}, True, float("nan"), float("inf"), -float("inf"), -1, 10**400, "9" * 5000, ["x"]],
    ids=lambda value: repr(value)[:20],
)
def test_a_field_that_is_something_else(name: str, value: Any) -> None:
    data = said(**{name: value})
    if isinstance(SAID[name], str) and isinstance(value, str):
        # A text is a text, whatever it says; but not a long one.
        assert len(getattr(parse_probe(data, NOW, "tower"), name)) <= 200
        return
    with pytest.raises(ProtocolError) as caught:
        parse_probe(data, NOW, "tower")
    assert caught.value.subject == "tower"
    assert len(caught.value.what) < 300


def test_a_clock_that_no_date_can_tell() -> None:
    with pytest.raises(ProtocolError):
        parse_probe(said(time=1 << 38), NOW, "tower")
    far = parse_probe(said(time=1 << 37), NOW, "tower")
    assert datetime.fromtimestamp(NOW + far.clock_offset_s, UTC).year > 6000


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff", b"[" * 100_000, b"[]", b"null", b'"x"', b"{}", b"{}{}"])
def test_what_is_no_object(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_probe(data, NOW, "tower")


def test_texts_are_bounded_and_cannot_draw() -> None:
    probe = parse_probe(said(kernel="\x1b[2J6.1\n\x07" + "x" * 10_000, python=["\x1b[1m" * 100, {}]), NOW, "tower")
    assert probe.kernel.startswith("6.1 xxx")
    assert len(probe.kernel) <= 200
    assert "\x1b" not in probe.kernel + probe.python
    assert len(probe.python) <= 20
    assert parse_probe(said(kernel="\ud800"), NOW, "tower").kernel.isprintable()
    assert parse_probe(said(python="no list"), NOW, "tower").python == ""


@pytest.mark.parametrize(("offset", "words"), [(119, ""), (-119, ""), (121, "2m01s ahead"), (-86400, "24h00m behind")])
def test_a_clock_that_is_off(offset: float, words: str) -> None:
    probe = parse_probe(said(time=NOW + offset), NOW, "tower")
    assert words in probe.fault
    assert bool(probe.fault) == bool(words)


def test_a_host_without_a_sandbox_cannot_build() -> None:
    assert parse_probe(said(sandbox="bubblewrap is not installed"), NOW, "tower").fault == "bubblewrap is not installed"


def test_offsets() -> None:
    assert format_offset(0.3) == "0.3s ahead"
    assert format_offset(-3600) == "1h00m behind"


@pytest.mark.parametrize(
    ("status", "words", "text"),
    [
        (127, b"sh: exec: python3: not found", "has no python3"),
        (1, b"Python 3.7\n", "has Python 3.7, too old for builds"),
        (1, b"", "status 1: it said nothing"),
        (3, b"a\n\x1b[2Jlast \xff words\n", "status 3: last \ufffd words"),
    ],
)
def test_what_a_failed_program_means(status: int, words: bytes, text: str) -> None:
    error = far_side_error(status, words, "tower")
    assert isinstance(error, OffloadError)
    assert text in str(error)
    assert "\x1b" not in error.render()


def programs() -> list[Path]:
    # `shell` is for people on this host.
    service = (path for path in (shipped() / "images/guest/build_service").glob("*.py") if path.name != "shell.py")
    return [Path(far_side.__file__), *sorted(service)]


@pytest.mark.parametrize("path", programs(), ids=lambda path: path.name)
def test_what_is_sent_is_in_the_language_of_an_old_python(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=OLDEST_PYTHON)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Match), f"{path.name}:{node.lineno}: match is 3.10's"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            assert not node.keywords, f"{path.name}:{node.lineno}: zip(strict=...) is 3.10's"


def test_the_service_is_packed_the_same_each_time() -> None:
    first = pack_service()
    pack_service.cache_clear()
    assert pack_service() == first
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert {"build_service/service.py", "build_service/__init__.py"} <= set(archive.namelist())
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def test_the_command_survives_any_shell() -> None:
    command = far_side_command("exchange", "5")
    quoted = command.split("'")[1]
    # csh takes `!` and newlines also within quotes.
    assert not {"'", "\n", "!"} & set(quoted)
    assert command.endswith(f" {len(far_side_program())} exchange 5")


def test_this_host(tmp_path: Path) -> None:
    probe = probe_local(tmp_path / "not/there/yet")
    assert probe.clock_offset_s == 0
    assert probe.cores > 0
    assert (probe.memory_mib or 0) > 0
    assert (probe.disk_free or 0) > 0
