import io
import os
import socket
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.builder.prepare import prepare_source
from offloadd.builder.source import clamp_tar, pack_source
from offloadd.errors import UsageError

NEWEST = 1_577_836_800


def pack(directory: Path, **arguments: object) -> bytes:
    return b"".join(pack_source(directory, **arguments))  # type: ignore[arg-type]


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/a").write_text("a" * 1000)
    (tree / "sub.x").write_text("x")
    os.symlink(".//no/./where/", tree / "link")  # noqa: PTH211
    (tree / "z-hard").hardlink_to(tree / "sub/a")
    (tree / "sub/a").chmod(0o4755)
    os.utime(tree / "sub/a", (1e9, 1e9 + 0.5))
    return tree


def test_order_kinds_owner_and_times(tree: Path) -> None:
    found = members(pack(tree, newest=NEWEST))
    assert [(name, member.type, member.linkname) for name, member in found.items()] == [
        ("link", tarfile.SYMTYPE, ".//no/./where/"),
        ("sub", tarfile.DIRTYPE, ""),
        ("sub/a", tarfile.REGTYPE, ""),
        ("sub.x", tarfile.REGTYPE, ""),
        ("z-hard", tarfile.LNKTYPE, "sub/a"),
    ]
    assert {(member.uid, member.gid, member.uname, member.gname) for member in found.values()} == {(1000, 1000, "", "")}
    assert {name: member.mtime for name, member in found.items()} == {
        "link": NEWEST,
        "sub": NEWEST,
        "sub/a": 1_000_000_000,
        "sub.x": NEWEST,
        "z-hard": 1_000_000_000,
    }
    assert found["sub/a"].mode == 0o755


def test_the_same_tree_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    first = pack(tree, newest=NEWEST)
    # Another order of creation, other inodes, other times: all later than the newest.
    copy = tmp_path / "copy"
    copy.mkdir()
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        # Python 3.14 would refuse more by itself; Debian's 3.11.2 knows no filters yet.
        tar.extraction_filter = getattr(tarfile, "tar_filter", None)
        for member in reversed(tar.getmembers()):
            if not member.islnk():
                tar.extract(member, copy)
    (copy / "z-hard").hardlink_to(copy / "sub/a")
    assert pack(copy, newest=NEWEST) == first


def test_without_a_newest_time_times_stay(tree: Path) -> None:
    os.utime(tree / "sub.x", (4e9, 4e9))
    assert members(pack(tree))["sub.x"].mtime == 4_000_000_000
    os.utime(tree / "sub.x", (-5, -5))
    assert members(pack(tree))["sub.x"].mtime == 0


def test_left_out(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(members(pack(tree, exclude=[Path("sub"), tree / "link"]))) == ["sub.x", "z-hard"]
    monkeypatch.chdir(tree)
    assert list(members(pack(Path(), exclude=[tree / "sub/a"]))) == ["link", "sub", "sub.x", "z-hard"]


def test_long_and_odd_names(tmp_path: Path) -> None:
    names = [b"n" * 255, "é".encode() * 60, b"\xff\xfe", b"new\nline"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_text("x")
        (tmp_path / os.fsdecode(b"l" + name[:200])).symlink_to(os.fsdecode(b"t" * 200 + name))
    with tarfile.open(fileobj=io.BytesIO(pack(tmp_path)), encoding="utf-8", errors="surrogateescape") as tar:
        found = {os.fsencode(member.name): os.fsencode(member.linkname) for member in tar}
    assert found == dict.fromkeys(names, b"") | {b"l" + name[:200]: b"t" * 200 + name for name in names}


def test_sockets_and_fifos_are_refused_by_name(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent"))
    with pytest.raises(UsageError, match=r"agent: is a socket, which cannot be sent") as caught:
        pack(tmp_path)
    assert caught.value.hint
    assert members(pack(tmp_path, exclude=[Path("agent")])) == {}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe: is a fifo"):
        pack(tmp_path, exclude=[Path("agent")])


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing: cannot be read: No such file or directory"):
        pack(tmp_path / "missing")


@pytest.mark.parametrize(("change", "what"), [(-1, "got shorter"), (1, "grew")])
def test_a_file_that_changes_meanwhile(tmp_path: Path, change: int, what: str) -> None:
    (tmp_path / "f").write_bytes(bytes(1_000_000))
    stream = pack_source(tmp_path)
    next(stream)
    os.truncate(tmp_path / "f", 1_000_000 + change)
    with pytest.raises(UsageError, match=what):
        list(stream)


# Tars that were uploaded


def clamp(data: bytes, newest: int = NEWEST) -> bytes:
    target = io.BytesIO()
    clamp_tar(io.BytesIO(data), target, newest)
    return target.getvalue()


def tar_of(*infos: tarfile.TarInfo, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"c" * info.size))
    return buffer.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def test_what_we_packed_is_clamped_to_what_we_had_packed(tree: Path) -> None:
    assert clamp(pack(tree)) == pack(tree, newest=NEWEST)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_formats(tar_format: int) -> None:
    long = "d" * 90 + "/" + "n" * (60 if tar_format == tarfile.USTAR_FORMAT else 200)
    found = members(
        clamp(
            tar_of(
                info("./", tarfile.DIRTYPE),
                info("./a", size=700, mtime=NEWEST + 5, mode=0o4711, uid=77, uname="somebody"),
                info("d" * 90, tarfile.DIRTYPE, mtime=5),
                info(long, mtime=5),
                info("s", tarfile.SYMTYPE, linkname="x" * 90),
                info("h", tarfile.LNKTYPE, linkname="./a"),
                tar_format=tar_format,
            )
        )
    )
    assert {name: (member.size, member.mtime, member.mode, member.uid, member.uname) for name, member in found.items()} == {
        "a": (700, NEWEST, 0o711, 1000, ""),
        "d" * 90: (0, 5, 0o644, 1000, ""),
        long: (0, 5, 0o644, 1000, ""),
        "s": (0, 0, 0o644, 1000, ""),
        "h": (0, 0, 0o644, 1000, ""),
    }
    assert (found["s"].linkname, found["h"].linkname) == ("x" * 90, "a")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (tar_of(info("/etc/passwd")), "leads out"),
        (tar_of(info("a/../../b")), "leads out"),
        (tar_of(info("h", tarfile.LNKTYPE, linkname="../b")), "leads out"),
        (tar_of(info("dev", tarfile.CHRTYPE)), "a member of type b'3'"),
        (tar_of(info("fifo", tarfile.FIFOTYPE)), "a member of type b'6'"),
        (tar_of(info("sparse", tarfile.GNUTYPE_SPARSE)), "a member of type b'S'"),
        (tar_of(info("a", pax_headers={"GNU.sparse.map": "0,1"})), "a sparse file"),
        (tar_of(info("a", size=5))[:1000], "cut off"),
        (tar_of(info("a", size=5))[:1024], "cut off"),
        (b"", "cut off"),
        (b"x" * 5000, "something else than a number"),
        (b"1" * 5000, "checksum"),
    ],
)
def test_uploads_that_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        clamp(data)


def test_an_extended_header_of_gigabytes_is_not_read() -> None:
    header = info("x", tarfile.XHDTYPE, size=8 << 30).tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(UsageError, match="extended headers of 8589935104 bytes"):
        clamp(header)


@given(st.binary(max_size=3000), st.integers(0, 3000), st.binary(max_size=30))
def test_garbage_is_refused_calmly(garbage: bytes, at: int, change: bytes) -> None:
    valid = tar_of(info("a" * 150, size=600, mtime=5), info("s", tarfile.SYMTYPE, linkname="x"))
    for data in (garbage, valid[:at] + change + valid[at + len(change) :]):
        try:
            result = clamp(data)
        except UsageError:
            continue
        assert all(member.mtime <= NEWEST for member in members(result).values())


def test_a_fetched_source_replaces_the_file_of_its_name(tmp_path: Path) -> None:
    """The guest refuses a name that comes twice."""
    sent, target, fetched = tmp_path / "sent.tar", tmp_path / "target.tar", tmp_path / "x.tar.gz"
    folder = (info("d", tarfile.DIRTYPE), info("d/x.tar.gz", size=2))
    sent.write_bytes(tar_of(info("a", size=3), info("x.tar.gz", size=600), *folder))
    fetched.write_bytes(b"fetched")
    prepare_source(sent, [fetched], target, NEWEST)
    with tarfile.open(target) as tar:
        assert sorted(tar.getnames()) == ["a", "d", "d/x.tar.gz", "x.tar.gz"]
        content = tar.extractfile("x.tar.gz")
        assert content is not None
        assert content.read() == b"fetched"
        assert tar.getmember("x.tar.gz").mtime == NEWEST
