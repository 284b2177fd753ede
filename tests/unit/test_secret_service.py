import os
import socket
from pathlib import Path

import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ConfigError, ProtocolError
from offloadd.guest.secret_service import (
    HELLO,
    MAX_FILES,
    SecretFile,
    encode_header,
    read_secret_root,
    receive_hello,
    send_secrets,
)
from tests.guest_modules import load_guest_module
from tests.secret_header import decode_header

guest_program = load_guest_module("guest_agent.secrets")

parts = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda part: part not in (".", "..")
)
names = st.lists(parts, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
modes = st.integers(0, 0o7777).map(lambda bits: 0o100000 | bits)
secrets = st.lists(st.builds(SecretFile, names, modes, st.binary(max_size=20)), unique_by=lambda file: file.name)


def test_the_bytes_are_guix_s() -> None:
    files = [SecretFile("/etc/guix/acl", 33188, b"(acl)"), SecretFile('/odd "name"\\\n\té\x01', 33152, b"")]
    assert HELLO == b"(secret-service-server (version 0))"
    assert encode_header(files) == (
        b'(secrets (version 0) (files (("/etc/guix/acl" 5 33188) ("/odd \\"name\\"\\\\\\n\\t\xc3\xa9\\x01" 0 33152))))'
    )
    assert encode_header([]) == b"(secrets (version 0) (files ()))"


@given(secrets)
def test_headers_survive(files: list[SecretFile]) -> None:
    expected = [(file.name, len(file.content), file.mode) for file in files]
    assert decode_header(encode_header(files)) == expected


@given(secrets, st.binary(max_size=5))
def test_the_guest_s_program_reads_what_the_host_writes(files: list[SecretFile], after: bytes) -> None:
    header = encode_header(files)
    expression, length = guest_program.read_expression(header + after)
    assert length == len(header)
    assert guest_program.check_header(expression) == [(file.name, len(file.content), file.mode & 0o7777) for file in files]


@given(secrets, st.data())
def test_the_guest_s_program_waits_for_the_whole_header(files: list[SecretFile], data: st.DataObject) -> None:
    header = encode_header(files)
    with pytest.raises(IndexError):
        guest_program.read_expression(header[: data.draw(st.integers(0, len(header) - 1))])


@given(st.one_of(st.binary(), st.text(alphabet='()"\\ x0#o;\n').map(str.encode)))
def test_the_guest_s_program_takes_garbage_calmly(data: bytes) -> None:
    try:
        expression, length = guest_program.read_expression(data)
    except (IndexError, ValueError):
        return
    assert isinstance(expression, list)
    assert 0 < length <= len(data)


@pytest.mark.parametrize(
    "header", [b"", b"()", b"(secrets (version 1) (files ()))", b'(secrets (version 0) (files (("/a" x 1))))', b"\xff"]
)
def test_what_is_no_header(header: bytes) -> None:
    with pytest.raises(ProtocolError, match="header of the secrets"):
        decode_header(header)


def test_contents_are_never_shown() -> None:
    assert repr(SecretFile("/a", 0o100600, b"private")) == "SecretFile(name='/a', mode=33152)"


# The secret root


def test_files_are_sorted_by_name_with_the_modes_of_what_links_point_to(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc-x").write_text("1")
    (tmp_path / "etc/key").write_text("2")
    (tmp_path / "etc/key").chmod(0o600)
    (tmp_path / "link").symlink_to("etc/key")
    assert [(file.name, file.mode, file.content) for file in read_secret_root(tmp_path)] == [
        ("/etc-x", (tmp_path / "etc-x").stat().st_mode, b"1"),
        ("/etc/key", 0o100600, b"2"),
        ("/link", 0o100600, b"2"),
    ]


def test_every_file_that_cannot_be_sent_is_named(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "good").write_text("x")
    (tmp_path / "a-dangling").symlink_to("nowhere")
    (tmp_path / "b-directory").symlink_to("d")
    os.mkfifo(tmp_path / "c-fifo")
    (tmp_path / os.fsdecode(b"d-\xff")).write_text("x")
    with (tmp_path / "e-large").open("wb") as file:
        file.truncate(1 << 40)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "f-socket"))
    with pytest.raises(ConfigError) as caught:
        read_secret_root(tmp_path)
    shown = [(problem.file.rpartition("/")[2], problem.message.partition(": ")[2]) for problem in caught.value.problems]
    assert shown == [
        ("a-dangling", "it is a link to something that does not exist"),
        ("b-directory", "it is a link to a directory"),
        ("c-fifo", "it is not a regular file"),
        ("d-\\xff", "its name is not UTF-8"),
        ("e-large", "it is larger than 64 MiB"),
        ("f-socket", "it is not a regular file"),
    ]


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: secret-root: cannot be sent into a guest: No such file"):
        read_secret_root(tmp_path / "missing")


def test_too_many_files(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 1):
        (tmp_path / str(number)).touch()
    with pytest.raises(ConfigError, match="more than 1000 files"):
        read_secret_root(tmp_path)


# The streams


async def test_a_hello_in_pieces() -> None:
    for cut in range(1, len(HELLO)):
        ours, guests = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guests.send_all, HELLO[:cut])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(guests.send_all, HELLO[cut:])
            assert await receive_hello(ours)


async def test_a_hello_that_is_cut_off() -> None:
    ours, guests = trio.testing.memory_stream_pair()
    await guests.send_all(HELLO[:-1])
    await guests.send_eof()
    assert not await receive_hello(ours)


async def test_files_follow_the_header_without_a_gap() -> None:
    files = [SecretFile("/a", 0o100600, b"one"), SecretFile("/b", 0o100644, b""), SecretFile("/c", 0o100644, b"two")]
    ours, guests = trio.testing.memory_stream_pair()
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_secrets, ours, files)
        while piece := await guests.receive_some():
            received += piece
        await guests.aclose()
    assert received == encode_header(files) + b"onetwo"
