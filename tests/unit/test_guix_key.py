"""Guix's signing keys: their form, and that none is ever overwritten."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest

from offloadd.errors import ConfigError, NotFoundError, UsageError
from offloadd.guix.files import configuration_directory, owner_for
from offloadd.guix.key import make_signing_key, parse_public_key, read_public_key
from offloadd.guix.sexp import Sexp, advanced, parse_sexp

POINT = bytes(range(100, 132))
KEY: Sexp = (b"public-key", (b"ecc", (b"curve", b"Ed25519"), (b"q", POINT)))


def modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def test_a_pair_has_guix_s_form_and_modes(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        pair = make_signing_key(tmp_path / "etc/guix")
    finally:
        os.umask(old)
    folder = tmp_path / "etc/guix"
    assert modes(folder) == {"signing-key.pub": 0o444, "signing-key.sec": 0o400}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert pair.made == (folder / "signing-key.sec", folder / "signing-key.pub")
    public, private = (folder / "signing-key.pub").read_bytes(), (folder / "signing-key.sec").read_bytes()
    point = re.fullmatch(rb"\(public-key \n \(ecc \n  \(curve Ed25519\)\n  \(q #([0-9A-F]{64})#\)\n  \)\n \)\n", public)
    assert point is not None
    numbers = re.fullmatch(
        rb"\(private-key \n \(ecc \n  \(curve Ed25519\)\n  \(q #([0-9A-F]{64})#\)\n  \(d #([0-9A-F]{64})#\)\n  \)\n \)\n",
        private,
    )
    assert numbers is not None
    assert (len(public), len(private)) == (118, 192)
    assert numbers[1] == point[1]
    scalar = int(numbers[2], 16)
    assert scalar % 8 == 0
    assert scalar >> 254 == 1
    assert pair.public.fingerprint == hashlib.sha256(bytes.fromhex(point[1].decode())).hexdigest()
    assert read_public_key(folder / "signing-key.pub") == pair.public
    assert pair.public.text == public


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    first = make_signing_key(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = make_signing_key(tmp_path)
    assert again.made == ()
    assert again.public == first.public
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert make_signing_key(tmp_path / "other").public != first.public


def test_a_lost_public_half_comes_from_the_private_one(tmp_path: Path) -> None:
    first = make_signing_key(tmp_path)
    (tmp_path / "signing-key.pub").unlink()
    again = make_signing_key(tmp_path)
    assert again.made == (tmp_path / "signing-key.pub",)
    assert again.public == first.public


def test_nothing_secret_of_an_rsa_key_gets_into_the_public_half(tmp_path: Path) -> None:
    numbers = {name: name * 4 for name in (b"n", b"e", b"d", b"p", b"q", b"u")}
    private: Sexp = (b"private-key", (b"rsa", *numbers.items()))
    (tmp_path / "signing-key.sec").write_bytes(advanced(private))
    make_signing_key(tmp_path)
    public = parse_sexp((tmp_path / "signing-key.pub").read_bytes(), "")
    assert public == (b"public-key", (b"rsa", (b"n", b"nnnn"), (b"e", b"eeee")))


def test_a_public_half_alone_is_not_replaced(tmp_path: Path) -> None:
    make_signing_key(tmp_path)
    (tmp_path / "signing-key.sec").unlink()
    with pytest.raises(UsageError, match=r"without signing-key\.sec"):
        make_signing_key(tmp_path)
    assert not (tmp_path / "signing-key.sec").exists()


def test_halves_of_two_keys_are_told(tmp_path: Path) -> None:
    make_signing_key(tmp_path)
    make_signing_key(tmp_path / "other")
    (tmp_path / "signing-key.pub").unlink()
    (tmp_path / "other/signing-key.pub").rename(tmp_path / "signing-key.pub")
    with pytest.raises(ConfigError, match="does not belong to"):
        make_signing_key(tmp_path)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    folder, outside = tmp_path / "guix", tmp_path / "outside"
    folder.mkdir()
    (folder / "signing-key.sec").symlink_to(outside)
    with pytest.raises(NotFoundError):
        make_signing_key(folder)
    assert not outside.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["signing-key.sec"]


def test_a_broken_private_key_is_told_without_its_text(tmp_path: Path) -> None:
    (tmp_path / "signing-key.sec").write_bytes(b"(private-key (ecc (curve Ed25519) (d #SECRET#)))")
    with pytest.raises(ConfigError, match="no hexadecimal number") as caught:
        make_signing_key(tmp_path)
    assert "SECRET" not in caught.value.render()
    for text in (b"(private-key (ecc (curve Ed25519) (d #4142#)))", b"(private-key (ecc ()))", b'(private-key (ecc ""))'):
        (tmp_path / "signing-key.sec").write_bytes(text)
        with pytest.raises(ConfigError, match="no private key"):
            make_signing_key(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_the_store_gets_the_files(tmp_path: Path) -> None:
    os.chown(tmp_path, 61000, 61001)
    make_signing_key(tmp_path, owner_for(tmp_path))
    make_signing_key(tmp_path / "made", owner_for(tmp_path))
    paths = [*tmp_path.iterdir(), *(tmp_path / "made").iterdir()]
    assert len(paths) == 5
    assert {(path.stat().st_uid, path.stat().st_gid) for path in paths} == {(61000, 61001)}


def test_the_configuration_directory_is_guix_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GUIX_CONFIGURATION_DIRECTORY", raising=False)
    assert configuration_directory() == Path("/etc/guix")
    monkeypatch.setenv("GUIX_CONFIGURATION_DIRECTORY", str(tmp_path))
    assert configuration_directory() == tmp_path


def test_keys_are_read_in_any_form() -> None:
    key = parse_public_key(advanced(KEY), "f")
    assert key == parse_public_key(b"(public-key(ecc(curve Ed25519)(q #%s#)))" % POINT.hex().encode(), "f")
    assert key.kind == "Ed25519"
    assert key.fingerprint == hashlib.sha256(POINT).hexdigest()
    rsa = parse_public_key(b"(public-key (rsa (n #00C0#) (e #010001#)))", "f")
    assert rsa.kind == "rsa"
    # A domain parameter of many keys, and no point.
    one, two = (parse_public_key(b"(public-key (dsa (q #07#) (y #%s#)))" % y, "f") for y in (b"01", b"02"))
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"(public-key)", "is no public key"),
        (b"(public-key ecc)", "is no public key"),
        (b"(public-key (ecc))", "is no public key"),
        (b"(public-key (ecc (curve)))", "is no public key"),
        (b"(public-key (ecc (curve Ed25519) (q #00#) (q #01#)))", "is no public key"),
        (b"(public-key (rsa (n #01#)) (rsa (n #02#)))", "is no public key"),
        (b"(signature (data))", "is no public key"),
        (b"(private-key (ecc (d #00#)))", "is a private key"),
        (b"(public-key (ecc (curve Ed25519) (q #0102#)))", "has 32 bytes"),
        (b"(public-key (ecc (curve Ed25519)))", "has 32 bytes"),
        (b"ssh-ed25519 AAAA", "no S-expression"),
    ],
)
def test_what_is_no_public_key_is_refused(text: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_public_key(text, "f")
