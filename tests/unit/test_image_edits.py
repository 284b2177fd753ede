"""What is written into the files of a Debian GNU/Hurd disk, and where its partitions are."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ImageError
from offloadd.image import accounts
from offloadd.image.partitions import find_partitions

MIB = 1 << 20
EDITS = (accounts.with_account, accounts.with_group, accounts.with_shadow, accounts.with_gshadow, accounts.with_include)


@given(st.text(alphabet="rot:ofadingx0+#\n Include/AcceptEnv", max_size=300))
def test_done_twice_is_done_once(text: str) -> None:
    for edit in EDITS:
        once = edit(text)
        assert edit(once) == once


@given(st.lists(st.from_regex(r"[a-z]{1,6}:x:1[0-9]{3}:5::/:/bin/sh", fullmatch=True), max_size=5))
def test_other_lines_stay_in_their_order(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    changed = accounts.with_account(text).splitlines()
    assert [line for line in changed if not line.startswith("offloading:")] == lines
    assert "offloading:x:900:900::/var/lib/offloading:/bin/sh" in changed


def test_an_account_of_that_name_becomes_ours() -> None:
    text = "a:x:1:1::/:/bin/sh\noffloading:x:1001:1001::/home/o:/bin/false\nb:x:2:2::/:/bin/sh\n"
    expected = "a:x:1:1::/:/bin/sh\noffloading:x:900:900::/var/lib/offloading:/bin/sh\nb:x:2:2::/:/bin/sh\n"
    assert accounts.with_account(text) == expected


def test_lines_before_nis() -> None:
    assert accounts.with_group("a:x:1:\n+:::\n") == "a:x:1:\noffloading:x:900:\n+:::\n"


@pytest.mark.parametrize("password", ["", "!", "$y$j9T$abc", "*"])
def test_root_has_no_password(password: str) -> None:
    changed = accounts.with_shadow(f"root:{password}:19000:0:99999:7:::\n")
    assert changed.splitlines()[0] == "root:*:19000:0:99999:7:::"


def test_the_secret_service_comes_before_the_first_runlevel() -> None:
    text = "id:2:initdefault:\n# l2:2:wait:/etc/init.d/rc 2\nl0:0:wait:/etc/init.d/rc 0\nl2:2:wait:/etc/init.d/rc 2\n"
    lines = accounts.with_secret_service(text).splitlines()
    assert lines[3:] == [accounts.INITTAB_LINE, "l2:2:wait:/etc/init.d/rc 2"]
    assert accounts.with_secret_service("\n".join(lines) + "\n") == "\n".join(lines) + "\n"
    with pytest.raises(ValueError, match="starts no services"):
        accounts.with_secret_service("id:2:initdefault:\nl0:0:wait:/etc/init.d/rc 0\n")


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("UsePAM yes\n", "Include /etc/ssh/sshd_config.d/*.conf\nUsePAM yes\n"),
        ("# c\n Include  /etc/ssh/sshd_config.d/*.conf\nacceptenv LANG\n", None),
        ("Port 1\nInclude /etc/ssh/sshd_config.d/*.conf\n", "Include /etc/ssh/sshd_config.d/*.conf\nPort 1\n"),
    ],
)
def test_our_part_of_sshd_config_comes_first(text: str, changed: str | None) -> None:
    assert accounts.with_include(text).startswith(changed or "# c\n Include  /etc/ssh/sshd_config.d/*.conf\n#acceptenv")


def table(*entries: tuple[int, int, int]) -> bytes:
    packed = b"".join(struct.pack("<B3xB3xII", 0, kind, first, count) for kind, first, count in entries)
    return (bytes(446) + packed).ljust(510, b"\0") + b"\x55\xaa"


def test_logical_partitions(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as out:
        out.truncate(8 * MIB)
        out.write(table((0x83, 2048, 2048), (0x05, 4096, 8192)))
        out.seek(4096 * 512)
        out.write(table((0x82, 64, 1000), (0x05, 4096, 4096)))
        out.seek(8192 * 512)
        out.write(table((0x83, 64, 2000)))
    found = [(part.number, part.start // 512, part.size // 512, part.table) for part in find_partitions(disk, "i")]
    assert found == [(1, 2048, 2048, "mbr"), (5, 4160, 1000, "logical"), (6, 8256, 2000, "logical")]


def test_a_chain_of_partitions_that_goes_in_circles_ends(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as out:
        out.truncate(8 * MIB)
        out.write(table((0x05, 4096, 8192)))
        out.seek(4096 * 512)
        out.write(table((0x83, 64, 1000), (0x05, 0, 4096)))
    assert [part.number for part in find_partitions(disk, "i")] == [5]


@given(st.binary(min_size=64, max_size=64), st.booleans())
def test_any_table_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, entries: bytes, gpt: bool) -> None:
    disk = tmp_path_factory.mktemp("disk") / "disk"
    protective = struct.pack("<B3xB3xII", 0, 0xEE, 1, 100) if gpt else b""
    header = b"EFI PART" + entries * 2
    disk.write_bytes((bytes(446) + (protective + entries)[:64] + b"\x55\xaa" + header).ljust(100 * 512, b"\0"))
    try:
        parts = find_partitions(disk, "i")
    except ImageError:
        return
    assert parts
    assert all(0 <= part.start <= part.end <= 100 * 512 for part in parts)


@pytest.mark.parametrize("entries_at", [1 << 60, (1 << 64) - 1, 2047])
def test_a_gpt_whose_entries_are_not_on_the_disk(tmp_path: Path, entries_at: int) -> None:
    disk = tmp_path / "disk"
    protective = struct.pack("<B3xB3xII", 0, 0xEE, 1, 100)
    header = struct.pack(
        "<8sIII4xQQQQ16sQIII", b"EFI PART", 1 << 16, 92, 0, 1, 2047, 34, 2000, bytes(16), entries_at, 128, 128, 0
    )
    sectors = bytes(446) + protective.ljust(64, b"\0") + b"\x55\xaa" + header
    disk.write_bytes(sectors.ljust(MIB, b"\0"))
    with pytest.raises(ImageError, match="its GPT is not understood"):
        find_partitions(disk, "i")
