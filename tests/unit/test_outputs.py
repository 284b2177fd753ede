import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offloadd.builder.outputs import Unpacked, leads_out, open_outputs_receiver, unpack_outputs
from offloadd.builder.tar import END, TarError, TarReader, padding
from offloadd.errors import BuildFailedError, HostError, ProtocolError, UsageError


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def link(name: str, target: str) -> tarfile.TarInfo:
    return info(name, tarfile.SYMTYPE, linkname=target)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "beside").write_text("untouched")
    return tmp_path / "top/out"


def unpack(target: Path, *infos: tarfile.TarInfo, raw: bytes | None = None, **limits: int) -> Unpacked:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in infos:
            tar.addfile(member, io.BytesIO(b"c" * member.size))
    tar_path = target.parents[1] / "outputs.tar"
    tar_path.write_bytes(buffer.getvalue() if raw is None else raw)
    return unpack_outputs(tar_path, target, **limits)


def listing(root: Path) -> dict[str, object]:
    """Everything below `root`: links with their targets, files with their sizes."""
    return {
        str(path.relative_to(root)): os.readlink(path)  # noqa: PTH115
        if path.is_symlink()
        else path.stat().st_size
        if path.is_file()
        else None
        for path in sorted(root.rglob("*"))
    }


def test_files_directories_and_links(target: Path) -> None:
    done = unpack(
        target,
        info("a", size=3, mode=0o640, mtime=1_500_000_000),
        info("d", tarfile.DIRTYPE, mode=0o000),
        info("d/deep/b", size=100_000, mode=0o6777),
        link("d/link", "../a"),
        link("d/deep/up", "../../d/./deep"),
        link("dangling", "nowhere/at/all"),
    )
    assert done == Unpacked(files=2, size=100_003, left_out=())
    assert listing(target) == {
        "a": 3,
        "d": None,
        "d/deep": None,
        "d/deep/b": 100_000,
        "d/deep/up": "../../d/./deep",
        "d/link": "../a",
        "dangling": "nowhere/at/all",
    }
    modes = {name: (target / name).stat().st_mode & 0o7777 for name in ("a", "d", "d/deep/b")}
    assert modes == {"a": 0o640, "d": 0o700, "d/deep/b": 0o755}
    assert (target / "a").stat().st_mtime == 1_500_000_000


def test_a_second_time_replaces_files_and_links(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "mine").write_text("mine")
    (target / "a").symlink_to("../../beside")
    (target / "l").write_text("x")
    for _ in range(2):
        unpack(target, info("d", tarfile.DIRTYPE), info("d/b"), info("a", size=1), link("l", "a"))
    assert listing(target) == {"a": 1, "d": None, "d/b": 0, "l": "a", "mine": 4}
    assert (target.parents[1] / "beside").read_text() == "untouched"


@pytest.mark.parametrize(
    ("infos", "what"),
    [
        ([info("/etc/x")], "leads out of the directory"),
        ([info("../beside", size=1)], "leads out of the directory"),
        ([info("a/../../../beside", size=1)], "leads out of the directory"),
        ([info("a"), info("h", tarfile.LNKTYPE, linkname="a")], "is a hard link"),
        ([info("n", tarfile.BLKTYPE)], "only files, directories and links"),
        ([info("n", tarfile.CHRTYPE)], "only files, directories and links"),
        ([info("n", tarfile.FIFOTYPE)], "only files, directories and links"),
        ([info("n" * 256)], "is too long"),
        ([info("n/" * 3000)], "leads out of the directory"),
        ([info("a"), info("b"), info("c")], "more than 3 members"),
        ([link("a", "")], "a link to nothing"),
        ([info("a", pax_headers={"GNU.sparse.realsize": str(1 << 60)})], "a sparse file"),
    ],
)
def test_what_a_guest_must_not_send(target: Path, infos: list[tarfile.TarInfo], what: str) -> None:
    with pytest.raises(ProtocolError, match=f"the guest's outputs are refused: .*{what}"):
        unpack(target, info("first", size=1), *infos, max_members=3)
    assert not target.exists()
    assert (target.parents[1] / "beside").read_text() == "untouched"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"x" * 2000,
        info("a", size=1 << 60).tobuf(tarfile.GNU_FORMAT),
        info("a", size=1 << 80).tobuf(tarfile.GNU_FORMAT) + bytes(1024),
        info("a", size=-1).tobuf(tarfile.GNU_FORMAT) + bytes(1024),
        info("a", tarfile.XHDTYPE, size=1 << 40).tobuf(tarfile.GNU_FORMAT),
        info("a", tarfile.GNUTYPE_LONGNAME, size=1 << 40).tobuf(tarfile.GNU_FORMAT),
    ],
)
def test_damaged_tars(target: Path, raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(target, raw=raw)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("l", "/etc/passwd"),
        ("l", ".."),
        ("l", "../out/a"),
        ("d/l", "../.."),
        ("d/l", "./../../a"),
        # Lexically inside; but `s` may be a link, and `s/..` is wherever that leads.
        ("l", "s/.."),
        ("d/l", "../s/../a"),
    ],
)
def test_links_that_lead_out_are_left_out(target: Path, name: str, where: str) -> None:
    assert unpack(target, link(name, where), info("a", size=1)).left_out == (f"{name} -> {where}",)
    assert listing(target) == {"a": 1} | ({"d": None} if "/" in name else {})


def test_many_links_that_lead_out_fill_no_memory(target: Path) -> None:
    assert len(unpack(target, *(link(f"l{number}", "/x") for number in range(1200))).left_out) == 1000


@pytest.mark.parametrize(
    "infos",
    [
        [link("d", "."), info("d/x", size=1)],
        [info("real", tarfile.DIRTYPE), link("d", "real"), info("d/x", size=1)],
        [link("d", "real"), info("d", tarfile.DIRTYPE)],
        [info("d"), info("d/x")],
        [info("d/x"), info("d")],
    ],
)
def test_names_that_contradict_each_other(target: Path, infos: list[tarfile.TarInfo]) -> None:
    with pytest.raises(UsageError, match="d is in the way"):
        unpack(target, *infos)
    assert "real/x" not in listing(target)
    assert not (target / "x").exists()


def test_links_of_the_user_s_are_not_followed_either(target: Path, tmp_path: Path) -> None:
    target.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (target / "d").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="d is in the way"):
        unpack(target, info("d/x", size=1))
    assert listing(tmp_path / "elsewhere") == {}


def test_names_that_are_no_text(target: Path) -> None:
    name = os.fsdecode(b"\xff")
    unpack(target, info(name, size=1), link("l", name))
    assert listing(target) == {name: 1, "l": name}


names = st.lists(st.sampled_from(["a", "b", "..", "."]), min_size=1, max_size=3).map("/".join)
member_infos = st.one_of(
    st.builds(info, names, st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE])),
    st.builds(link, names, st.builds("{}{}".format, st.sampled_from(["", "/"]), names)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.lists(member_infos, max_size=8))
def test_nothing_ever_leads_out(tmp_path_factory: pytest.TempPathFactory, infos: list[tarfile.TarInfo]) -> None:
    base = tmp_path_factory.mktemp("any")
    target = base / "top/out"
    target.mkdir(parents=True)
    with suppress(ProtocolError, UsageError):
        unpack(target, *infos)
    assert {str(path.relative_to(base)).split("/")[0] for path in base.iterdir()} == {"top", "outputs.tar"}
    assert [path.name for path in (base / "top").iterdir()] == ["out"]
    for path in target.rglob("*"):
        assert path.is_relative_to(target)
        if path.is_symlink():
            assert Path(os.path.realpath(path)).is_relative_to(target), (path, path.readlink())


def test_leads_out_counts_from_where_the_link_is() -> None:
    assert not leads_out("a/b/l", "../../x")
    assert leads_out("a/b/l", "../../../x")


# The receiver


def test_pieces_are_kept_until_the_end(tmp_path: Path) -> None:
    with open_outputs_receiver(tmp_path / "o.tar", max_bytes=10) as receiver:
        receiver.write(b"12345")
        receiver.write(b"67890")
        assert not receiver.complete
        receiver.finish()
        assert (receiver.complete, receiver.size) == (True, 10)
        with pytest.raises(ProtocolError, match="after their end"):
            receiver.write(b"")
        with pytest.raises(ProtocolError, match="twice"):
            receiver.finish()
    assert (tmp_path / "o.tar").read_bytes() == b"1234567890"
    assert (tmp_path / "o.tar").stat().st_mode & 0o777 == 0o600


def test_too_much(tmp_path: Path) -> None:
    with open_outputs_receiver(tmp_path / "o.tar", max_bytes=10) as receiver:
        receiver.write(bytes(10))
        with pytest.raises(BuildFailedError, match="larger than 10 bytes"):
            receiver.write(b"x")
    assert (tmp_path / "o.tar").stat().st_size == 10


def test_a_full_disk(tmp_path: Path) -> None:
    with open_outputs_receiver(tmp_path / "o.tar") as receiver:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, receiver._descriptor)
        os.close(full)
        with pytest.raises(HostError, match=r"o.tar: cannot keep the outputs: No space left"):
            receiver.write(b"x")


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "o.tar").symlink_to("victim")
    with pytest.raises(HostError, match="cannot keep the outputs"), open_outputs_receiver(tmp_path / "o.tar"):
        pass
    assert not (tmp_path / "victim").exists()


def test_names_that_make_too_many_directories(target: Path) -> None:
    with pytest.raises(ProtocolError, match="nested too deeply"):
        unpack(target, info("/".join("d" * 257), tarfile.DIRTYPE))
    deep = [info(f"{number}/" + "/".join("d" * 60), tarfile.DIRTYPE) for number in range(10)]
    with pytest.raises(ProtocolError, match="too many directories"):
        unpack(target, *deep, max_members=10)
    assert not target.exists()
    unpack(target, info("/".join("d" * 256), tarfile.DIRTYPE))


def extended(data: bytes) -> bytes:
    info_ = tarfile.TarInfo("x")
    info_.type, info_.size = tarfile.XHDTYPE, len(data)
    return info_.tobuf(tarfile.USTAR_FORMAT) + data + padding(len(data))


def test_headers_without_end_fill_no_memory() -> None:
    """A few thousand of them are some kilobytes when they are packed."""
    records = b"".join(b"%d k%d=\n" % (len(str(number)) + 6, number) for number in range(10000, 12000))
    tar = extended(records) * 100 + tarfile.TarInfo("a").tobuf() + END
    with pytest.raises(TarError, match="extended headers of"):
        list(TarReader(io.BytesIO(tar)))
    empty = extended(b"") * 3000 + tarfile.TarInfo("a").tobuf() + END
    with pytest.raises(TarError, match="extended headers of"):
        list(TarReader(io.BytesIO(empty)))
    some = extended(records) * 2 + extended(b"10 path=b\n") + tarfile.TarInfo("a").tobuf() + END
    assert [member.name for member in TarReader(io.BytesIO(some))] == ["b"]
