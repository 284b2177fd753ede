"""Secret roots, as OpenSSH's own ssh-keygen reads them."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from offloadd.errors import HostError
from offloadd.guest import guix_secrets, secret_root
from offloadd.guest.guix_secrets import GUIX, ensure_guix_secrets, renew_signing_key
from offloadd.guest.secret_root import SecretRoot, ensure_secret_root, write_new
from offloadd.guest.secret_service import read_secret_root
from offloadd.guix.acl import ACL, Acl, open_acl
from offloadd.guix.key import PUBLIC_KEY, make_signing_key, read_public_key


def keygen(*arguments: str | Path) -> str:
    return subprocess.run(
        ["ssh-keygen", *arguments], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    ).stdout


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def made(tmp_path: Path) -> SecretRoot:
    return ensure_secret_root("vm", tmp_path / "secrets")


def test_the_keys_are_what_they_should_be(made: SecretRoot) -> None:
    ssh = made.root / "etc/ssh"
    for kind, bits in (("ed25519", "256"), ("ecdsa", "256")):
        private = ssh / f"ssh_host_{kind}_key"
        assert keygen("-y", "-f", private).split()[:2] == private.with_suffix(".pub").read_text().split()[:2]
        size, _, *comment, name = keygen("-l", "-f", private.with_suffix(".pub")).split()
        assert (size, name, " ".join(comment)) == (bits, f"({kind.upper()})", "vm (offload)")
    public = keygen("-y", "-f", made.client_key)
    assert public.split()[:2] == (ssh / "authorized_keys.d/offloading").read_text().split()[:2]
    assert [path.name for path in made.host_keys] == ["ssh_host_ed25519_key.pub", "ssh_host_ecdsa_key.pub"]


def test_nobody_else_can_read_them(made: SecretRoot, tmp_path: Path) -> None:
    ssh = made.root / "etc/ssh"
    assert mode(made.client_key) == mode(ssh / "ssh_host_ed25519_key") == mode(ssh / "ssh_host_ecdsa_key") == 0o600
    assert mode(tmp_path / "secrets") == mode(made.client_key.parent) == mode(made.root) == 0o700
    assert mode(ssh / "ssh_host_ed25519_key.pub") == 0o644
    assert mode(ssh / "authorized_keys.d/offloading") == 0o444
    # The private half of the client's key is not among what the guest gets.
    assert [file.name for file in read_secret_root(made.root)] == [
        "/etc/ssh/authorized_keys.d/offloading",
        "/etc/ssh/ssh_host_ecdsa_key",
        "/etc/ssh/ssh_host_ecdsa_key.pub",
        "/etc/ssh/ssh_host_ed25519_key",
        "/etc/ssh/ssh_host_ed25519_key.pub",
    ]


def test_what_is_there_stays(made: SecretRoot, tmp_path: Path) -> None:
    authorized = made.root / "etc/ssh/authorized_keys.d/offloading"
    authorized.chmod(0o644)
    with authorized.open("a") as file:
        file.write("ssh-ed25519 AAAA mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert ensure_secret_root("vm", tmp_path / "secrets") == made
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_missing_is_made_again(made: SecretRoot, tmp_path: Path) -> None:
    public = made.root / "etc/ssh/ssh_host_ed25519_key.pub"
    key = public.read_text()
    authorized = made.root / "etc/ssh/authorized_keys.d/offloading"
    public.unlink()
    authorized.chmod(0o644)
    authorized.write_text("ssh-ed25519 AAAA mine")
    ensure_secret_root("vm", tmp_path / "secrets")
    assert public.read_text().split()[:2] == key.split()[:2]
    mine, ours = authorized.read_text().splitlines()
    assert mine == "ssh-ed25519 AAAA mine"
    assert ours.split()[:2] == made.client_key.with_name("id_ed25519.pub").read_text().split()[:2]


def test_a_root_of_the_users_own(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "etc/ssh").mkdir(parents=True)
    keygen("-q", "-t", "ed25519", "-N", "", "-C", "mine", "-f", own / "etc/ssh/ssh_host_ed25519_key")
    key = (own / "etc/ssh/ssh_host_ed25519_key").read_bytes()
    made = ensure_secret_root("vm", tmp_path / "secrets", own)
    assert made.root == own
    assert (own / "etc/ssh/ssh_host_ed25519_key").read_bytes() == key
    assert made.client_key == tmp_path / "secrets/vm/id_ed25519"


def test_a_key_with_a_passphrase_is_refused_without_a_word_of_it(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "etc/ssh").mkdir(parents=True)
    path = own / "etc/ssh/ssh_host_ed25519_key"
    keygen("-q", "-t", "ed25519", "-N", "secret words", "-f", path)
    path.with_suffix(".pub").unlink()
    with pytest.raises(HostError) as caught:
        ensure_secret_root("vm", tmp_path / "secrets", own)
    assert caught.value.subject == str(path)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"\xff\xfe"])
def test_a_damaged_private_key(made: SecretRoot, tmp_path: Path, content: bytes) -> None:
    made.client_key.write_bytes(content)
    made.client_key.with_name("id_ed25519.pub").unlink()
    with pytest.raises(HostError, match="is no private key"):
        ensure_secret_root("vm", tmp_path / "secrets")


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage", b"\xff\xfe"])
def test_a_damaged_public_key(made: SecretRoot, tmp_path: Path, content: bytes) -> None:
    made.client_key.with_name("id_ed25519.pub").write_bytes(content)
    with pytest.raises(HostError, match="is no public key"):
        ensure_secret_root("vm", tmp_path / "secrets")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "secrets").write_text("a file")
    with pytest.raises(HostError) as caught:
        ensure_secret_root("vm", tmp_path / "secrets")
    assert caught.value.subject == str(tmp_path / "secrets")


def test_the_umask_does_not_matter(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = ensure_secret_root("vm", tmp_path / "secrets")
    finally:
        os.umask(before)
    assert mode(made.client_key) == 0o600
    assert mode(made.root) == 0o700


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fchmod", full)
        with pytest.raises(HostError, match="No space left"):
            ensure_secret_root("vm", tmp_path / "secrets")
    assert not [path for path in (tmp_path / "secrets").rglob("*") if not path.is_dir()]
    assert ensure_secret_root("vm", tmp_path / "secrets").client_key.exists()


def test_files_are_on_the_disk_before_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power loss leaves empty keys, which nothing makes anew."""
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        done.append(("directory", about.st_ino) if stat.S_ISDIR(about.st_mode) else (f"{about.st_size} bytes", about.st_ino))
        fsync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        done.append(("named", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_new(tmp_path / "key", b"secret", 0o600)
    inode = (tmp_path / "key").stat().st_ino
    assert done == [("6 bytes", inode), ("named", inode), ("directory", tmp_path.stat().st_ino)]


def test_no_stale_public_half_is_beside_a_new_key(made: SecretRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped there, it would be taken for the other half for ever."""
    made.client_key.unlink()

    def stopped(path: Path, *_: object) -> None:
        assert path == made.client_key
        assert not path.with_name("id_ed25519.pub").exists()
        raise OSError(errno.EIO, "stopped")

    with monkeypatch.context() as patched:
        patched.setattr(secret_root, "write_new", stopped)
        with pytest.raises(HostError, match="stopped"):
            ensure_secret_root("vm", tmp_path / "secrets")


class Killed(BaseException):
    """Nothing of ours is done after it."""


@pytest.mark.parametrize("at", range(1, 7))
def test_a_renewal_of_guix_s_key_that_was_killed_is_completed(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIX_CONFIGURATION_DIRECTORY", str(tmp_path / "host"))
    folder = tmp_path / "root" / GUIX
    ensure_guix_secrets(tmp_path / "root")
    friend = make_signing_key(tmp_path / "friend").public
    with open_acl(folder / ACL) as acl:
        acl.authorize(friend)
    calls = 0

    def killing(real: Callable[..., object]) -> Callable[..., object]:
        def change(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return real(*arguments)

        return change

    with monkeypatch.context() as patched:
        for name in ("open_acl", "remove", "make_signing_key"):
            patched.setattr(guix_secrets, name, killing(getattr(guix_secrets, name)))
        try:
            renew_signing_key(tmp_path / "root")
        except Killed:
            assert at < 6
    ensure_guix_secrets(tmp_path / "root")
    # The key that is there, and no other one of ours.
    assert {entry.key for entry in Acl.read(folder / ACL).entries} == {friend, read_public_key(folder / PUBLIC_KEY)}


def test_a_list_of_guix_s_that_is_a_link_stays(tmp_path: Path) -> None:
    folder = tmp_path / "root" / GUIX
    make_signing_key(folder)
    (tmp_path / "declared").write_bytes(b"(acl)")
    (folder / ACL).symlink_to(tmp_path / "declared")
    ensure_guix_secrets(tmp_path / "root")
    assert (folder / ACL).is_symlink()
    assert (tmp_path / "declared").read_bytes() == b"(acl)"


def test_what_a_killed_daemon_left_half_written_is_not_sent(made: SecretRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_secret_root(made.root)
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    write_new(made.root / "etc/ssh/ssh_host_ed25519_key", b"half of a key", 0o600)
    assert len(list(made.root.glob("etc/ssh/.ssh_host_ed25519_key.*"))) == 1
    assert read_secret_root(made.root) == before
