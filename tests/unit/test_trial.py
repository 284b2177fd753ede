"""What a trial of a machine takes from it."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from offloadd.daemon.trial import read_output
from offloadd.errors import ProtocolError
from offloadd.place.probe import EXCHANGED


def a_tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_what_came_back(tmp_path: Path) -> None:
    path = tmp_path / "outputs.tar"
    path.write_bytes(a_tar(other=b"x", back=b"s" * EXCHANGED))
    assert read_output(path) == b"s" * EXCHANGED
    path.write_bytes(a_tar(other=b"x"))
    assert read_output(path) == b""


def test_no_more_is_read_than_tells_that_it_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "outputs.tar"
    path.write_bytes(a_tar(back=bytes(20 * EXCHANGED)))
    assert EXCHANGED < len(read_output(path)) < 20 * EXCHANGED


NO_TARS = {
    "empty": b"",
    "junk": b"junk" * 1000,
    "packed": gzip.compress(a_tar(back=b"sent")),
    "cut off": a_tar(back=b"sent")[:700],
}


@pytest.mark.parametrize("content", NO_TARS.values(), ids=NO_TARS.keys())
def test_what_is_no_tar_is_an_error_of_the_machine(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "outputs.tar"
    path.write_bytes(content)
    with pytest.raises(ProtocolError, match="what a build gave back is refused"):
        read_output(path)
