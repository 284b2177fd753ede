"""Mirrors from apt's configuration, progress from mmdebstrap's output."""

from __future__ import annotations

import pytest

from offloadd.binfmt.status import Status
from offloadd.debian import (
    Mirror,
    ProgressParser,
    check_runs,
    choose_mirrors,
    find_keyring,
    installed_packages,
    lacks_suite,
    missing_packages,
    parse_indexes,
    without_broken,
)
from offloadd.errors import HostError

URIS = """\
'http://mirror.example/debian/dists/bookworm/InRelease' mirror.example_debian_dists_bookworm_InRelease 0
'http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' mirror.example_Packages 0
'http://mirror.example/debian/dists/bookworm/contrib/binary-amd64/Packages.xz' mirror.example_Packages 0
'http://mirror.example/debian/dists/bookworm/main/binary-all/Packages.xz' mirror.example_Packages 0
'http://mirror.example/debian/dists/bookworm/main/i18n/Translation-en.xz' mirror.example_Translation 0
'http://mirror.example/debian/dists/bookworm-updates/main/binary-amd64/Packages.xz' mirror.example_Packages 0
'http://mirror.example/debian-security/dists/bookworm-security/main/binary-amd64/Packages.xz' mirror.example_Packages 0
'https://other.example/tools/dists/bookworm-tools/main/binary-amd64/Packages.gz' other.example_Packages 0
W: a warning
""".splitlines()

DEB822 = """\
# our mirror
Types: deb
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/ours.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----
"""
ONE_LINE = """\
# deb http://mirror.example/debian sid main
deb [arch=amd64 signed-by=/etc/apt/keyrings/line.gpg] http://mirror.example/debian bookworm main contrib
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian-security bookworm-security main
"""


def test_indexes_become_mirrors() -> None:
    mirrors = parse_indexes(URIS)
    assert [(mirror.uri, mirror.suite, mirror.components) for mirror in mirrors] == [
        ("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        ("http://mirror.example/debian", "bookworm-updates", ("main",)),
        ("http://mirror.example/debian-security", "bookworm-security", ("main",)),
        ("https://other.example/tools", "bookworm-tools", ("main",)),
    ]


def test_a_suite_comes_with_its_updates_and_security() -> None:
    assert choose_mirrors("bookworm", parse_indexes(URIS)) == tuple(parse_indexes(URIS)[:3])


def test_another_suite_comes_from_the_same_archive() -> None:
    assert choose_mirrors("sid", parse_indexes(URIS)) == (Mirror(uri="http://mirror.example/debian", suite="sid"),)


def test_no_mirror_at_all() -> None:
    with pytest.raises(HostError, match="no Debian mirror for sid") as caught:
        choose_mirrors("sid", parse_indexes(URIS)[1:3])
    assert "mirror:" in caught.value.hint


def test_keyrings() -> None:
    archive, updates, security, _ = parse_indexes(URIS)
    assert find_keyring(archive, [DEB822]) == find_keyring(updates, [DEB822]) == "/usr/share/keyrings/ours.gpg"
    assert find_keyring(security, [DEB822]) == ""
    assert find_keyring(archive, [ONE_LINE]) == "/etc/apt/keyrings/line.gpg"
    assert find_keyring(security, [ONE_LINE]) == ""
    assert find_keyring(archive, []) == ""


def test_mirror_lines() -> None:
    mirror = Mirror(uri="http://mirror.example/debian", suite="sid", signed_by="/k.gpg")
    assert mirror.line() == "deb [signed-by=/k.gpg] http://mirror.example/debian sid main"
    assert Mirror(uri="http://m.example", suite="sid").line() == "deb http://m.example sid main"


OUTPUT = """\
I: running apt-get update...
Get:1 http://mirror.example/debian bookworm InRelease [151 kB]
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://mirror.example/debian bookworm/main amd64 libc6 amd64 2.36 [2 MB]
Get:2 http://mirror.example/debian bookworm/main amd64 dash amd64 0.5 [90 kB]
Unpacking libc6:amd64 (2.36) ...
Unpacking dash (0.5) ...
Setting up libc6:amd64 (2.36) ...
Setting up dash (0.5) ...
0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://mirror.example/debian bookworm/main amd64 python3 amd64 3.11 [26 kB]
Unpacking python3 (3.11) ...
Setting up python3 (3.11) ...
I: creating tarball...
I: success in 20 seconds
""".splitlines()


def test_progress_only_grows() -> None:
    told: list[tuple[str, float | None]] = []
    parser = ProgressParser(lambda phase, fraction: told.append((phase, fraction)))
    for line in OUTPUT:
        parser.line(line)
    fractions = [fraction for _, fraction in told if fraction is not None]
    assert fractions == sorted(fractions)
    assert 0.8 < fractions[-1] < 1
    phases = [phase for phase, _ in told]
    assert phases[0] == "reading the package lists"
    assert phases[2:5] == ["downloading libc6", "downloading dash", "unpacking libc6"]
    assert phases[-2:] == ["setting up python3", "writing the root file system"]


def test_progress_survives_any_line() -> None:
    parser = ProgressParser(lambda phase, fraction: None)
    for line in ("", "Get:", "Get:1 x", "0 upgraded, 0 newly installed", "Unpacking ", "Setting up x"):
        parser.line(line)


def test_installed_packages() -> None:
    status = (
        "Package: b\nStatus: install ok installed\nVersion: 2:1-1\nDescription: x\n Package: no\n\n"
        "Package: a\nStatus: install ok installed\nVersion: 1\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n"
    )
    assert installed_packages(status) == {"a": "1", "b": "2:1-1"}


def test_foreign_architectures_need_their_emulator() -> None:
    nothing = Status(mounted=True, enabled=True)
    check_runs("amd64", ("x86_64-linux", "i686-linux"), nothing, "image x")
    check_runs("i386", ("x86_64-linux", "i686-linux"), nothing, "image x")
    check_runs("sparc64", ("x86_64-linux",), nothing, "image x")
    with pytest.raises(HostError) as caught:
        check_runs("arm64", ("x86_64-linux", "i686-linux"), nothing, "image debian-arm64")
    assert caught.value.render() == (
        "image debian-arm64: programs of arm64 do not run here: qemu-aarch64 is not registered\n"
        "  hint: offload binfmt register aarch64"
    )


def test_packages_that_apt_does_not_find() -> None:
    said = (
        "Reading package lists...\nE: Unable to locate package sl-\nE: Unable to locate package sl-\n"
        "E: Package 'mailx' has no installation candidate\nE: Version '9' for 'hello' was not found\n"
        "E: setup failed: E: apt-get --yes install sl- failed\nI: main() received signal PIPE: waiting for setup...\n"
    )
    assert missing_packages(said) == ["sl-", "mailx", "hello"]
    assert missing_packages("E: Unable to fetch some archives\n") == []


UPDATES, SECURITY = "http://mirror.example/debian", "http://mirror.example/debian-security"


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ([], ["bookworm", "bookworm-updates", "bookworm-security"]),
        (
            [f"E: Failed to fetch {SECURITY}/dists/bookworm-security/main/binary-i386/Packages.xz  Sync"],
            ["bookworm", "bookworm-updates"],
        ),
        ([f"W: Failed to fetch {UPDATES}/dists/bookworm-updates/InRelease  x"], ["bookworm", "bookworm-security"]),
        ([f"Get:1 {SECURITY}/dists/bookworm-security/InRelease"], ["bookworm", "bookworm-updates", "bookworm-security"]),
        (
            [
                f"E: Failed to fetch {UPDATES}/dists/{suite}/InRelease  Could not resolve"
                for suite in ("bookworm", "bookworm-updates")
            ],
            ["bookworm", "bookworm-updates", "bookworm-security"],
        ),
    ],
)
def test_mirrors_that_are_broken(said: list[str], left: list[str]) -> None:
    mirrors = choose_mirrors("bookworm", parse_indexes(URIS))
    assert [mirror.suite for mirror in without_broken(mirrors, "bookworm", said)] == left


def test_a_mirror_without_the_suite_is_not_one_that_does_not_answer() -> None:
    assert lacks_suite(
        "Reading package lists...\nE: The repository 'http://mirror/debian bookwrm Release' does not have a Release file.\n"
    )
    assert not lacks_suite("W: Failed to fetch http://mirror/debian/dists/bookworm/InRelease  Could not connect to mirror:80\n")
