"""The table of system types."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.model.system import SYSTEMS, find_system

EXPECTED = {
    # Guix and Nix -> triplet, Debian, QEMU's system and user target, bits, endianness
    "x86_64-linux": ("x86_64-linux-gnu", "amd64", "x86_64", "x86_64", 64, "little"),
    "i686-linux": ("i686-linux-gnu", "i386", "x86_64", "i386", 32, "little"),
    "aarch64-linux": ("aarch64-linux-gnu", "arm64", "aarch64", "aarch64", 64, "little"),
    "armhf-linux": ("arm-linux-gnueabihf", "armhf", "arm", "arm", 32, "little"),
    "riscv64-linux": ("riscv64-linux-gnu", "riscv64", "riscv64", "riscv64", 64, "little"),
    "powerpc64le-linux": ("powerpc64le-linux-gnu", "ppc64el", "ppc64", "ppc64le", 64, "little"),
    "s390x-linux": ("s390x-linux-gnu", "s390x", "s390x", "s390x", 64, "big"),
    "mips64el-linux": ("mips64el-linux-gnuabi64", "mips64el", "mips64el", "mips64el", 64, "little"),
    "loongarch64-linux": ("loongarch64-linux-gnu", "loong64", "loongarch64", "loongarch64", 64, "little"),
    "i586-gnu": ("i686-gnu", "hurd-i386", "x86_64", None, 32, "little"),
    "x86_64-gnu": ("x86_64-gnu", "hurd-amd64", "x86_64", None, 64, "little"),
}


def test_the_table_is_whole() -> None:
    found = {s.name: (s.triplet, s.debian, s.qemu, s.user, s.bits, s.endian) for s in SYSTEMS.values()}
    assert found == EXPECTED


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("arm64", "aarch64-linux"),
        ("aarch64-linux-gnu", "aarch64-linux"),
        ("aarch64-unknown-linux-gnu", "aarch64-linux"),
        ("armv7l-linux", "armhf-linux"),
        ("AMD64", "x86_64-linux"),
        ("x86_64-pc-linux-gnu", "x86_64-linux"),
        ("i386", "i686-linux"),
        ("i386-linux-gnu", "i686-linux"),
        ("ppc64el", "powerpc64le-linux"),
        ("loong64", "loongarch64-linux"),
        ("hurd-i386", "i586-gnu"),
        ("i586-pc-gnu", "i586-gnu"),
        ("x86_64-pc-gnu", "x86_64-gnu"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert find_system(alias).name == name


def test_every_name_of_a_system_leads_to_it() -> None:
    for system in SYSTEMS.values():
        for name in (system.name, system.debian, system.triplet, *system.aliases):
            assert find_system(name) is system


@pytest.mark.parametrize(
    ("wrong", "near"), [("aarch46", "aarch64-linux"), ("arm46", "aarch64-linux"), ("x86-64-linux", "x86_64")]
)
def test_an_unknown_one_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown system type '{wrong}': did you mean .*{near}"):
        find_system(wrong)


def test_what_is_near_to_nothing_gets_all() -> None:
    with pytest.raises(ValueError, match=r"known: x86_64-linux, .*x86_64-gnu"):
        find_system("qqqq")


@given(st.text(max_size=30))
def test_any_text_is_answered(text: str) -> None:
    try:
        found = find_system(text)
    except ValueError as exc:
        found = None
        said = str(exc)
    assert found in SYSTEMS.values() if found else repr(text) in said
