"""Guix's ACL."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ConfigError, HostError, NotAllowedError, NotFoundError, UsageError
from offloadd.guix import acl as module
from offloadd.guix.acl import Acl, Entry, forget_comments, known_names, open_acl
from offloadd.guix.key import PublicKey, as_public_key, make_signing_key
from offloadd.guix.sexp import MAX_SIZE, Sexp, parse_sexp
from offloadd.guix.trust import keys_for_guest

_ENTRY = b"""\
 (entry\x20
  (public-key\x20
   (ecc\x20
    (curve Ed25519)
    (q #%s#)
    )
   )
  (tag\x20
   (guix import)
   )
  )
"""
FOREIGN = b"(entry (hash sha256 #0102#) (tag (ftp-access 'read')))".replace(b"'", b'"')
OTHER_TAG = b"(entry (public-key (rsa (n #00AB#) (e #03#))) (tag (guix export)))"


def key(number: int) -> PublicKey:
    found = as_public_key((b"public-key", (b"ecc", (b"curve", b"Ed25519"), (b"q", bytes([number]) * 32))))
    assert found is not None
    return found


def guix_text(*numbers: int) -> bytes:
    """What Guix writes for these keys."""
    entries = b"".join(_ENTRY % (b"%02X" % number * 32) for number in numbers)
    return b"(acl \n" + entries + b" )\n" if numbers else b"(acl)\n"


def authorize(path: Path, *numbers: int, comment: str = "") -> None:
    for number in numbers:
        with open_acl(path) as acl:
            acl.authorize(key(number), comment)


def inodes(folder: Path) -> dict[str, int]:
    """They change when a file is written."""
    return {file.name: file.stat().st_ino for file in folder.iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guix/acl"


def test_the_bytes_are_guix_s(path: Path) -> None:
    sizes = []
    for number in (0x91, 0x92, 0x93):
        authorize(path, number)
        sizes.append(path.stat().st_size)
    # The newest first.
    assert path.read_bytes() == guix_text(0x93, 0x92, 0x91)
    assert sizes == [182, 355, 528]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_new_acl_has_the_machine_s_own_key(tmp_path: Path) -> None:
    own = make_signing_key(tmp_path).public
    with open_acl(tmp_path / "acl") as acl:
        assert acl.authorize(key(0x91))
    with open_acl(tmp_path / "acl") as acl:
        assert [entry.key for entry in acl.entries] == [key(0x91), own]


def test_nothing_is_written_when_nothing_changed(path: Path) -> None:
    authorize(path, 0x91, 0x92, comment="ours")
    before = inodes(path.parent)
    assert len(before) == 2
    authorize(path, 0x91)
    assert inodes(path.parent) == before
    with open_acl(path):
        pass
    path.write_bytes(b" ".join(path.read_bytes().split()).lower().replace(b"ed25519", b"Ed25519"))
    written_by_hand = path.read_bytes(), path.stat().st_ino
    authorize(path, 0x91, 0x92)
    assert (path.read_bytes(), path.stat().st_ino) == written_by_hand


def test_an_acl_that_is_not_there_is_not_made_for_nothing(path: Path) -> None:
    with pytest.raises(NotFoundError), open_acl(path) as acl:
        acl.revoke("abcdef")
    with open_acl(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_nothing_is_written_when_the_block_fails(path: Path) -> None:
    authorize(path, 0x91)
    with pytest.raises(UsageError), open_acl(path) as acl:
        acl.authorize(key(0x92))
        acl.authorize(key(0x93), "two\nlines")
    assert path.read_bytes() == guix_text(0x91)


def test_mode_and_owner_stay(path: Path) -> None:
    authorize(path, 0x91)
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 61000, 61001)
    before = path.stat()
    authorize(path, 0x92)
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert sorted(file.name for file in path.parent.iterdir()) == ["acl"]


def test_duplicates_go_and_foreign_entries_stay(path: Path) -> None:
    path.parent.mkdir()
    known = b"(entry (public-key (ecc (curve Ed25519) (q |%s|))) (tag (guix import)))" % (b"kZGR" * 10 + b"kZE=")
    path.write_bytes(b"(acl " + FOREIGN + known + OTHER_TAG + known + b")")
    authorize(path, 0x91)
    expected = (parse_sexp(FOREIGN, ""), parse_sexp(b"(acl" + known + b")", "")[1], parse_sexp(OTHER_TAG, ""))
    acl = Acl.read(path)
    assert tuple(entry.sexp for entry in acl.entries) == expected
    assert [entry.authorizes for entry in acl.entries] == [False, True, False]
    assert [entry.is_understood for entry in acl.entries] == [False, True, False]
    assert parse_sexp(path.read_bytes(), "") == (b"acl", *expected)


def test_guix_does_not_mind_another_subject() -> None:
    entry = Entry((b"entry", (b"hash", b"sha256", b"12"), (b"tag", (b"guix", b"import"))))
    assert (entry.is_understood, entry.authorizes, entry.key) == (True, False, None)


def test_a_key_with_another_tag_is_not_authorized(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"(acl " + OTHER_TAG + b")")
    rsa = as_public_key(parse_sexp(OTHER_TAG, "")[1])
    assert rsa is not None
    with open_acl(path) as acl:
        assert acl.find(rsa) is None
        assert acl.authorize(rsa)
    assert [entry.authorizes for entry in Acl.read(path).entries] == [True, False]
    with open_acl(path) as acl:
        assert len(acl.revoke(rsa.fingerprint)) == 2
    assert path.read_bytes() == b"(acl)\n"


def test_revoke(path: Path, tmp_path: Path) -> None:
    authorize(path, 0x91, 0x92, 0x93)
    (tmp_path / "it.pub").write_bytes(key(0x91).text)
    with open_acl(path) as acl:
        assert [entry.key for entry in acl.revoke(key(0x92).fingerprint[:8].upper())] == [key(0x92)]
        assert [entry.key for entry in acl.revoke(str(tmp_path / "it.pub"))] == [key(0x91)]
        with pytest.raises(NotFoundError):
            acl.revoke(key(0x91).fingerprint)
        with pytest.raises(NotFoundError):
            acl.revoke(str(tmp_path / "nothing.pub"))
        with pytest.raises(UsageError, match="at least 4"):
            acl.revoke(key(0x93).fingerprint[:3])
    assert path.read_bytes() == guix_text(0x93)
    authorize(path, 0x92)
    # Back in the list, and first.
    assert path.read_bytes() == guix_text(0x92, 0x93)


def test_an_ambiguous_beginning_revokes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authorize(path, 0x91, 0x92)
    monkeypatch.setattr(PublicKey, "fingerprint", property(lambda self: "abcd" + self.parameters[b"q"].hex()))
    with pytest.raises(UsageError, match="2 keys begin so"), open_acl(path) as acl:
        acl.revoke("abcd")
    assert path.read_bytes() == guix_text(0x92, 0x91)


def test_comments_are_beside_the_list(path: Path) -> None:
    authorize(path, 0x91)
    authorize(path, 0x92, comment=' Zoë\'s (build) "server" ')
    side = path.with_name("acl.comments")
    assert path.read_bytes() == guix_text(0x92, 0x91)
    assert side.read_text() == f'{key(0x92).fingerprint} Zoë\'s (build) "server"\n'
    assert [entry.comment for entry in Acl.read(path).entries] == ['Zoë\'s (build) "server"', ""]
    authorize(path, 0x92)
    assert Acl.read(path).entries[0].comment
    authorize(path, 0x92, comment="other")
    assert [entry.comment for entry in Acl.read(path).entries] == ["other", ""]
    side.write_bytes(b"garbage\n\xff\xfe\n" + side.read_bytes())
    assert [entry.comment for entry in Acl.read(path).entries] == ["other", ""]
    with open_acl(path) as acl:
        acl.revoke(key(0x92).fingerprint)
    assert not side.exists()


class Killed(BaseException):
    """Nothing of ours is done after it."""


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("revoke", [False, True])
def test_a_key_is_never_there_without_its_comment(path: Path, at: int, revoke: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a guest's key is handed to the other guests, as one of the user's."""
    own = make_signing_key(path.parent).public
    authorize(path, 0x91)
    if revoke:
        authorize(path, 0x92, comment="offload: guest")
    calls = 0

    def killing(real: Callable[..., None]) -> Callable[..., None]:
        def change(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            real(*arguments)

        return change

    with monkeypatch.context() as patched:
        for name in ("replace", "remove"):
            patched.setattr(module, name, killing(getattr(module, name)))
        try:
            with open_acl(path) as acl:
                _ = acl.revoke(key(0x92).fingerprint) if revoke else acl.authorize(key(0x92), "offload: guest")
        except Killed:
            assert at < 3
    found = Acl.read(path).find(key(0x92))
    assert found is None or found.comment == "offload: guest"
    assert keys_for_guest(path.parent) == [key(0x91), own]
    # And again, to the end.
    with open_acl(path) as acl:
        acl.authorize(key(0x92), "offload: guest")
    assert Acl.read(path).entries[0].comment == "offload: guest"


def link_to_nothing(comments: Path) -> None:
    comments.symlink_to("nothing")


def make_too_large(comments: Path) -> None:
    comments.write_text(" " * (MAX_SIZE + 1))


def make_link(comments: Path) -> None:
    comments.with_name("target").write_text("")
    comments.symlink_to("target")


@pytest.mark.parametrize("make", [make_link, link_to_nothing, Path.mkdir])
def test_comments_that_cannot_be_written_are_refused_first(path: Path, make: Callable[[Path], None]) -> None:
    authorize(path, 0x91)
    make(path.with_name("acl.comments"))
    with pytest.raises((NotAllowedError, HostError)):
        authorize(path, 0x92, comment="offload: guest")
    assert path.read_bytes() == guix_text(0x91)


def test_a_link_with_comments_is_refused_before_a_key_is_revoked(path: Path) -> None:
    authorize(path, 0x91, comment="ours")
    side = path.with_name("acl.comments")
    side.rename(path.with_name("target"))
    side.symlink_to("target")
    with pytest.raises(NotAllowedError, match="symbolic link"), open_acl(path) as acl:
        acl.revoke(key(0x91).fingerprint)
    assert path.read_bytes() == guix_text(0x91)


@pytest.mark.parametrize("make", [Path.mkdir, link_to_nothing, make_too_large])
def test_comments_that_cannot_be_read_are_not_taken_for_none(path: Path, make: Callable[[Path], None]) -> None:
    authorize(path, 0x91)
    make_signing_key(path.parent)
    make(path.with_name("acl.comments"))
    with pytest.raises((NotAllowedError, HostError), match=r"acl\.comments"):
        Acl.read(path)
    with pytest.raises((NotAllowedError, HostError)):
        keys_for_guest(path.parent)


def test_comments_of_keys_that_are_not_there_are_forgotten(path: Path) -> None:
    forget_comments(path, [key(0x91).fingerprint])
    authorize(path, 0x91, comment="one")
    side = path.with_name("acl.comments")
    side.write_text(f"{key(0x92).fingerprint} two\n{side.read_text()}")
    forget_comments(path, [key(0x91).fingerprint, key(0x92).fingerprint])
    assert side.read_text() == f"{key(0x91).fingerprint} one\n"
    path.write_bytes(b"(acl)")
    forget_comments(path, [key(0x91).fingerprint])
    assert not side.exists()


@pytest.mark.parametrize("comment", ["two\nlines", "a\x1b[0m", "\0", "a\u2028b"])
def test_comments_are_one_line(path: Path, comment: str) -> None:
    with pytest.raises(UsageError, match="one line"):
        authorize(path, 0x91, comment=comment)
    assert not path.exists()


def test_links_are_not_written_through(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "store-acl"
    target.write_bytes(guix_text(0x91))
    path.parent.mkdir()
    path.symlink_to(target)
    assert [entry.key for entry in Acl.read(path).entries] == [key(0x91)]
    authorize(path, 0x91)
    with pytest.raises(NotAllowedError, match="symbolic link"):
        authorize(path, 0x92)
    assert target.read_bytes() == guix_text(0x91)
    assert path.is_symlink()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "is empty"),
        (b"(public-key (rsa (n #01#)))", "is no ACL"),
        (b"(acl (entry (a) (b)) trash)", "entry 2: is no entry"),
        (b"(acl (entree))", "entry 1: is no entry"),
        (b"(acl\n", "acl:1: column 1: this parenthesis is not closed"),
    ],
)
def test_what_is_no_acl_is_refused_and_stays(path: Path, text: bytes, what: str) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=what):
        authorize(path, 0x91)
    assert path.read_bytes() == text


def test_names_come_from_files(tmp_path: Path) -> None:
    shared = tmp_path / "share"
    shared.mkdir()
    (shared / "ci.example.org.pub").write_bytes(key(0x91).text)
    (shared / "broken.pub").write_bytes(b"(")
    own = make_signing_key(tmp_path / "guix").public
    names = known_names(tmp_path / "guix", [shared, tmp_path / "nothing"])
    assert names == {key(0x91).fingerprint: "ci.example.org", own.fingerprint: "the key of this directory"}


numbers = st.integers(1, 6)


@given(st.lists(st.tuples(st.booleans(), numbers), max_size=20))
def test_the_list_is_what_was_done_to_it(steps: list[tuple[bool, int]]) -> None:
    foreign: tuple[Sexp, ...] = parse_sexp(FOREIGN, "")
    acl = Acl(Path("acl"), [Entry(foreign)], is_there=True)
    expected: list[int] = []
    for add, number in steps:
        if add:
            assert acl.authorize(key(number)) == (number not in expected)
            expected = expected if number in expected else [number, *expected]
        elif number in expected:
            assert len(acl.revoke(key(number).fingerprint)) == 1
            expected.remove(number)
        else:
            with pytest.raises(NotFoundError):
                acl.revoke(key(number).fingerprint)
    assert [entry.key for entry in acl.entries] == [*map(key, expected), None]
    assert acl.changed == bool(expected)
    assert parse_sexp(acl.text, "") == (b"acl", *(entry.sexp for entry in acl.entries))
