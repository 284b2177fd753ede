"""What our files do in a Debian GNU/Hurd guest, as far as this host can show it: packages, sshd's settings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .real_sshd import find_sshd

GUEST = Path(__file__).parents[2] / "images/guest/hurd"


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    """A folder with an apt-get that notes what it is told, a word each line, and fails at what the file `fails` names."""
    program = tmp_path / "apt-get"
    program.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do echo "$word"; done >>{tmp_path}/told\n'
        f'echo "frontend=$DEBIAN_FRONTEND secret=$SECRET" >>{tmp_path}/told\n'
        f'! grep -q "^${{11}}$" {tmp_path}/fails\n'
    )
    program.chmod(0o755)
    (tmp_path / "fails").write_text("")
    return tmp_path


def install(apt: Path, wanted: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{apt}:/usr/bin:/bin", "SSH_ORIGINAL_COMMAND": "sh -c 'rm -rf /'", "SECRET": "x"}
    argv = [GUEST / "install-packages"]
    return subprocess.run(argv, input=wanted, capture_output=True, text=True, env=env, check=False)


SETTINGS = ("Dpkg::Use-Pty=0", "Dpkg::Options::=--force-confold", "DPkg::Lock::Timeout=600", "Acquire::Languages=none")
OPTIONS = ["-q", "-y", *(word for setting in SETTINGS for word in ("-o", setting))]
TOLD = "frontend=noninteractive secret="


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("gcc\nmake\n", ["gcc", "make"]),
        (
            " debhelper-compat (= 13), gcc:native [!hurd-any linux-any] <!nocheck> <!cross>,"
            "\n libfoo-dev (>= 1:2.0~rc1-1) | libbar",
            [
                "debhelper-compat (= 13)",
                "gcc:native [!hurd-any linux-any] <!nocheck> <!cross>",
                "libfoo-dev (>= 1:2.0~rc1-1) | libbar",
            ],
        ),
    ],
)
def test_packages_reach_apt_one_by_one(apt: Path, wanted: str, words: list[str]) -> None:
    result = install(apt, wanted)
    assert (result.returncode, result.stdout) == (0, "")
    told = (apt / "told").read_text().splitlines()
    assert told == [*OPTIONS, "update", TOLD, *OPTIONS, "--no-install-recommends", "satisfy", *words, TOLD]


def test_nothing_to_install(apt: Path) -> None:
    assert install(apt, "\n , \n").returncode == 0
    assert not (apt / "told").exists()


@pytest.mark.parametrize(
    "wanted",
    [
        "--download-only",
        "-o=a",
        "gcc; reboot",
        "gcc\0",
        "$(id)",
        "../a.deb",
        "/tmp/a.deb",
        "gcc (1)",
        "Conflicts: a",
        "GCC",
        "x",
        "a" * 70_000,
    ],
)
def test_what_is_no_package_starts_nothing(apt: Path, wanted: str) -> None:
    result = install(apt, f"make, {wanted}")
    assert result.returncode == 2
    assert result.stderr.startswith("install-packages: ")
    assert not (apt / "told").exists()


@pytest.mark.parametrize(
    ("fails", "message"), [("update", "has this machine `network: true`?"), ("--no-install-recommends", "")]
)
def test_apt_that_fails(apt: Path, fails: str, message: str) -> None:
    (apt / "fails").write_text(f"{fails}\n")
    result = install(apt, "gcc")
    assert result.returncode == 1
    assert message in result.stderr


def test_sshd_takes_our_settings_before_debian_s(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    config = tmp_path / "sshd_config"
    config.write_text(
        f"Include {GUEST}/sshd_config\nUsePAM yes\nPermitRootLogin yes\nPasswordAuthentication yes\nHostKey {tmp_path}/key\n"
    )
    shown = subprocess.run([find_sshd(), "-T", "-f", config], capture_output=True, text=True, check=True).stdout.splitlines()
    for line in (
        "usepam no",
        "permitrootlogin forced-commands-only",
        "passwordauthentication no",
        "kbdinteractiveauthentication no",
        "authorizedkeysfile /etc/ssh/authorized_keys.d/%u",
        "authenticationmethods publickey",
        "permituserenvironment no",
        "hostkey /etc/ssh/ssh_host_ed25519_key",
        "hostkey /etc/ssh/ssh_host_ecdsa_key",
    ):
        assert line in shown
    assert not any(line.startswith("acceptenv") for line in shown)
