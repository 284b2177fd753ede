"""Source control files, and which architectures they are for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.builder.dsc import Dsc, check_architecture, covers, parse_dsc
from offloadd.errors import NoMachineError, SourceError
from offloadd.model.system import SYSTEMS

DIGEST = "31e066137a962676e89f69d1b65382de95a7ef7d914b8cb956f41ea72e0f516b"
PLAIN = f"""\
Format: 3.0 (quilt)
Source: hello
Binary: hello
Architecture: any
Version: 1:2.10-3
Build-Depends: debhelper-compat (= 13),
 help2man
Checksums-Sha256:
 {DIGEST} 725946 hello_2.10.orig.tar.gz
 {DIGEST} 12684 hello_2.10-3.debian.tar.xz
Files:
 6cd0ffea3884a4e79330338dcc2987d6 725946 hello_2.10.orig.tar.gz
"""
SIGNED = f"""\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

{PLAIN}
-----BEGIN PGP SIGNATURE-----

iQEzBAEBCAAdFiEE1Uw7
-----END PGP SIGNATURE-----
"""
ARCHITECTURES = sorted(system.debian for system in SYSTEMS.values())


def changed(old: str, new: str) -> bytes:
    assert old in PLAIN
    return PLAIN.replace(old, new).encode()


@pytest.mark.parametrize("text", [PLAIN, SIGNED, PLAIN.replace("\n", "\r\n"), "\n" + PLAIN + "\nSource: other\n"])
def test_parse(text: str) -> None:
    dsc = parse_dsc(text.encode(), "hello.dsc")
    assert (dsc.source, dsc.version, dsc.version_without_epoch) == ("hello", "1:2.10-3", "2.10-3")
    assert dsc.directory == "hello-2.10"
    assert dsc.architectures == ("any",)
    assert [(file.name, file.size) for file in dsc.files] == [
        ("hello_2.10.orig.tar.gz", 725946),
        ("hello_2.10-3.debian.tar.xz", 12684),
    ]
    assert dsc.files[0].sha256 == DIGEST
    assert dsc.build_depends == ("debhelper-compat (= 13)", "help2man")


def test_native_directory() -> None:
    assert parse_dsc(changed("1:2.10-3", "0.5"), "x").directory == "hello-0.5"


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "a/b", "..", ".hidden", "-rf", "other.dsc", "a\tb", "hello_2.10-3.debian.tar.xz", "ä"],
)
def test_unsafe_file_names(name: str) -> None:
    with pytest.raises(SourceError, match=r"not a \.dsc"):
        parse_dsc(changed("725946 hello_2.10.orig.tar.gz\n 31e", f"725946 {name}\n 31e"), "x.dsc")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Source: hello", "Source: ../hello"),
        ("Source: hello", "Source: hello; rm -rf /"),
        ("Source: hello", "Source: hello\nSource: other"),
        ("Version: 1:2.10-3", "Version: $(id)"),
        ("Version: 1:2.10-3", "Version: 1/2"),
        ("Architecture: any", "Architecture: a/b"),
        ("Architecture: any", "Architecture:"),
        ("Architecture: any\n", ""),
        ("Checksums-Sha256", "Checksums-Sha1"),
        ("725946", "-1"),
        ("725946", "9" * 30),
        ("Format", " Format"),
        ("Format", "no field\nFormat"),
    ],
)
def test_refused(old: str, new: str) -> None:
    with pytest.raises(SourceError, match=r"not a \.dsc"):
        parse_dsc(changed(old, new), "x.dsc")


def test_too_large() -> None:
    with pytest.raises(SourceError, match="larger than 1 MiB"):
        parse_dsc(PLAIN.encode() + b"\n" * (1 << 20), "x.dsc")


@given(st.binary(max_size=2000) | st.text(max_size=500).map(lambda text: (PLAIN + text).encode("utf-8", "replace")))
def test_any_input_is_parsed_or_refused(data: bytes) -> None:
    try:
        dsc = parse_dsc(data, "x.dsc")
    except SourceError:
        return
    assert all("/" not in file.name and file.name[0] not in ".-" for file in dsc.files)


@pytest.mark.parametrize(
    ("wildcard", "meant"),
    [
        ("any", set(ARCHITECTURES)),
        ("all", set()),
        ("amd64", {"amd64"}),
        ("linux-any", set(ARCHITECTURES) - {"hurd-i386", "hurd-amd64"}),
        ("hurd-any", {"hurd-i386", "hurd-amd64"}),
        ("kfreebsd-any", set()),
        ("any-amd64", {"amd64", "hurd-amd64"}),
        ("any-i386", {"i386", "hurd-i386"}),
        ("any-arm", {"armhf"}),
        ("any-mips64el", {"mips64el"}),
        ("gnu-any-any", set(ARCHITECTURES)),
        ("musl-any-any", set()),
        ("hurd-i386", {"hurd-i386"}),
        ("linux-amd64", {"amd64"}),
    ],
)
def test_wildcards(wildcard: str, meant: set[str]) -> None:
    assert {architecture for architecture in ARCHITECTURES if covers(wildcard, architecture)} == meant


def dsc_for(*architectures: str) -> Dsc:
    return Dsc(source="x", version="1", architectures=architectures, files=())


@pytest.mark.parametrize("architectures", [("all",), ("any",), ("linux-any", "all"), ("amd64", "any-arm64")])
def test_covered_architecture(architectures: tuple[str, ...]) -> None:
    check_architecture(dsc_for(*architectures), "arm64")


@pytest.mark.parametrize("architectures", [("amd64",), ("amd64", "all"), ("hurd-any",), ("any-arm",)])
def test_excluded_architecture(architectures: tuple[str, ...]) -> None:
    with pytest.raises(NoMachineError, match="the package is not for arm64") as caught:
        check_architecture(dsc_for(*architectures), "arm64")
    assert " ".join(architectures) in str(caught.value)
