"""`offload guix keys` and `offload guix acl`, and their files in the hands of libgcrypt, which is what Guix reads them with."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ConfigError
from offloadd.guix.key import make_signing_key
from offloadd.guix.sexp import Sexp, advanced, canonical, parse_sexp
from tests.conftest import World

from .gcrypt import ADVANCED, CANONICAL, Gcrypt

try:
    gcrypt = Gcrypt()
except OSError:
    pytest.skip("libgcrypt is not installed", allow_module_level=True)

# Without null bytes, which libgcrypt prints as they are; its own reader ends there.  And it reads no `0:`.
atoms = st.one_of(
    st.binary(min_size=1, max_size=12).filter(lambda atom: 0 not in atom or atom[0] in (0, *range(128, 256))),
    st.text("abXY019-./_:*+= \"'\\\n\t", min_size=1, max_size=8).map(str.encode),
)
lists = st.recursive(
    st.lists(atoms, min_size=1, max_size=4).map(tuple),
    lambda inner: st.lists(atoms | inner, min_size=1, max_size=4).map(tuple),
    max_leaves=12,
)
_PIECES = (
    *(b"(", b")", b"(", b")", b" ", b"\n", b"a", b"acl", b"-1", b"12", b"3:abc", b"1:", b"#41#", b"# 4 1 #", b"#4", b'"a b"'),
    *(b'"', b"\\n", b"\\x41", b"\\101", b"\\q", b"|YWJj|", b"|", b"=", b";", b"\xc3\xa9", b"4#4142#", b'2"ab"', b"&", b"%"),
)
pieces = st.lists(st.sampled_from(_PIECES), max_size=12).map(b"".join)


@given(lists)
def test_libgcrypt_prints_the_same_text(sexp: tuple[Sexp, ...]) -> None:
    assert gcrypt.print(canonical(sexp), ADVANCED) == advanced(sexp)
    assert gcrypt.print(advanced(sexp), CANONICAL) == canonical(sexp)


@given(pieces.map(lambda inner: b"(" + inner + b")"))
def test_what_both_read_means_the_same(text: bytes) -> None:
    try:
        ours: bytes | None = canonical(parse_sexp(text, "f"))
    except ConfigError:
        ours = None
    theirs = gcrypt.print(text, CANONICAL)
    assert ours is None or theirs is None or ours == theirs
    # What libgcrypt reads and we refuse: text after the expression, and base64 that is none, which it takes for nothing.
    if theirs is not None and ours is None:
        assert b")" in text[:-1] or b"|" in text


@pytest.mark.parametrize("attempt", range(8))
def test_libgcrypt_signs_with_our_keys(tmp_path: Path, attempt: int) -> None:
    make_signing_key(tmp_path)
    make_signing_key(tmp_path / "other")
    private = (tmp_path / "signing-key.sec").read_bytes()
    public, other = ((tmp_path / name / "signing-key.pub").read_bytes() for name in (".", "other"))
    assert gcrypt.is_good(private)
    scalar = (tmp_path / "other/signing-key.sec").read_bytes().partition(b"(d ")[2]
    assert not gcrypt.is_good(private.partition(b"(d ")[0] + b"(d " + scalar)
    # As Guix signs (guix/pk-crypto.scm): deterministic ECDSA.
    data = b"(data (flags rfc6979) (hash sha256 #%s#))" % hashlib.sha256(b"%d" % attempt).hexdigest().encode()
    signature = gcrypt.sign(data, private)
    assert b"(ecdsa" in signature
    assert gcrypt.verify(signature, data, public)
    assert not gcrypt.verify(signature, data, other)
    assert gcrypt.print(public, ADVANCED) == public
    assert gcrypt.print(private, ADVANCED) == private


@pytest.fixture
def guix(tmp_path: Path) -> Path:
    """A configuration directory that is not there yet."""
    return tmp_path / "etc/guix"


def test_keys(world: World, guix: Path) -> None:
    assert "offload guix keys init" in world.run("guix", "keys", "show", "--directory", guix, status=5).stderr
    made = world.json("guix", "keys", "init", "--directory", guix)
    assert made["made"] == [str(guix / name) for name in ("signing-key.sec", "signing-key.pub", "acl")]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in guix.iterdir()} == {
        "signing-key.sec": 0o400,
        "signing-key.pub": 0o444,
        "acl": 0o644,
    }
    before = {path: path.read_bytes() for path in guix.iterdir()}
    assert made["fingerprint"] in world.run("guix", "keys", "init", "--directory", guix).stderr
    assert {path: path.read_bytes() for path in guix.iterdir()} == before
    shown = world.json("guix", "keys", "show", "--directory", guix)
    assert shown == {field: value for field, value in made.items() if field != "made"}
    assert shown["public_key"].encode() == (guix / "signing-key.pub").read_bytes()
    secret = (guix / "signing-key.sec").read_text().split("(d #")[1][:64]
    for text in (world.run("guix", "keys", "show", "--directory", guix).stdout, str(shown), str(made)):
        assert made["fingerprint"] in text
        assert secret not in text
    acl = (guix / "acl").read_bytes()
    assert len(acl) == 182
    assert gcrypt.print(acl, ADVANCED) == acl


def test_three_at_once_make_one_key(world: World, guix: Path) -> None:
    processes = [world.start("guix", "keys", "init", "--directory", guix, "--json") for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out.split('"fingerprint": ')[1][:66] for out, _ in results}) == 1
    assert gcrypt.is_good((guix / "signing-key.sec").read_bytes())
    assert sorted(path.name for path in guix.iterdir()) == ["acl", "signing-key.pub", "signing-key.sec"]


def test_the_directory_of_the_environment_is_taken(world: World, guix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIX_CONFIGURATION_DIRECTORY", str(guix))
    assert world.json("guix", "keys", "init")["file"] == str(guix / "signing-key.pub")


def test_acl(world: World, guix: Path) -> None:
    def acl(*arguments: str | Path, status: int = 0) -> str:
        result = world.run("guix", "acl", *arguments, "--directory", guix, status=status)
        return result.stdout + result.stderr

    assert "no key is authorized" in acl("list")
    assert "no such file" in acl("revoke", "abcdef", status=5)
    assert not guix.exists()
    mine = world.json("guix", "keys", "init", "--directory", guix)
    server = make_signing_key(guix / "server").public
    file = guix / "server/signing-key.pub"
    assert "authorized" in acl("authorize", file, "--comment", "the build server")
    assert "already" in acl("authorize", file)
    assert "the build server" in acl("list")
    rows = world.json("guix", "acl", "list", "--directory", guix)
    assert [(row["fingerprint"], row["comment"], row["authorizes"]) for row in rows] == [
        (server.fingerprint, "the build server", True),
        (mine["fingerprint"], "the key of this directory", True),
    ]
    assert "private key" in acl("authorize", guix / "server/signing-key.sec", status=3)
    acl("authorize", guix / "nothing", status=5)
    # `-` is standard input, which is empty here.
    assert "standard input:1: column 1: is empty" in acl("authorize", "-", status=3)
    assert "(the build server)" in acl("revoke", server.fingerprint[:12])
    acl("revoke", server.fingerprint, status=5)
    acl("revoke", "ab", status=2)
    assert "neither a fingerprint nor a file" in acl("revoke", "the server", status=5)
    assert len(world.json("guix", "acl", "list", "--directory", guix)) == 1
    (guix / "acl").write_bytes(b"(acl\n (entry (public-key) (tag (guix export)))\n)")
    assert "FOREIGN" in acl("list")
    assert "Guix refuses" in acl("list")
    (guix / "acl").write_bytes(b"(acl\n (entry (public-key ; mine\n")
    assert f"{guix}/acl:2: column 21: comments" in acl("list", status=3)
