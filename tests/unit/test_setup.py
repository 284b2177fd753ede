"""The steps of a setup and their undoing, in directories of our own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from offloadd.errors import HostError, NotAllowedError, NotFoundError, UsageError
from offloadd.guix import acl as acl_module
from offloadd.guix import files
from offloadd.guix.acl import Acl, open_acl
from offloadd.guix.files import Owner
from offloadd.guix.key import make_signing_key, read_public_key
from offloadd.setup import journal, steps
from offloadd.setup.guix import Guest, GuixHost, guix_steps
from offloadd.setup.journal import Journal, Record
from offloadd.setup.nix import nix_steps
from offloadd.setup.steps import Step, perform

Tree = dict[str, tuple[int, bytes]]


class Bench:
    """Guix's configuration and two machines."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.etc = root / "etc/guix"
        self.journal = root / "state/setup/guix.json"
        self.journal.parent.parent.mkdir()
        self.guests = [self._guest("one"), self._guest("two")]

    def _guest(self, name: str) -> Guest:
        folder = self.root / "secrets" / name
        (folder / "root/etc").mkdir(parents=True)
        (folder / "id").write_text(f"key of {name}\n")
        return Guest(machine=name, client_key=folder / "id", secret_root=folder / "root")

    def set_up(self, *machines: str) -> list[str]:
        """The files that are written, relative."""
        return [str(path.relative_to(self.root)) for path in perform(self.steps(*machines), Journal(self.journal))]

    def steps(self, *machines: str) -> list[Step]:
        host = GuixHost(directory=self.etc, owner=Owner(os.geteuid(), os.getegid()), live="(live)\n", hook=b"hook")
        return guix_steps(host, [guest for guest in self.guests if not machines or guest.machine in machines])

    def undo(self, *machines: str) -> dict[str, str]:
        done = list(Journal(self.journal).undo(machines))
        return {str(undone.path.relative_to(self.root)): undone.verdict for undone in done}

    def tree(self) -> Tree:
        """Everything but the journal."""
        paths = [path for path in self.root.rglob("*") if not path.is_relative_to(self.root / "state")]
        return {
            str(path.relative_to(self.root)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in paths
        }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_both_sides_trust_each_other(bench: Bench) -> None:
    make_signing_key(bench.root / "friend")
    friend = read_public_key(bench.root / "friend/signing-key.pub")
    bench.etc.mkdir(parents=True)
    with open_acl(bench.etc / "acl") as acl:
        acl.authorize(friend, "a friend")
    bench.set_up()
    host = Acl.read(bench.etc / "acl")
    own = read_public_key(bench.etc / "signing-key.pub")
    for guest in bench.guests:
        assert guest.secret_root is not None
        inside = guest.secret_root / "etc/guix"
        key = read_public_key(inside / "signing-key.pub")
        entry = host.find(key)
        assert entry is not None
        assert entry.comment == f"offload: {guest.machine}"
        keys = [entry.key for entry in Acl.read(inside / "acl").entries]
        # Not the other guest's.
        assert keys == [own, friend, key]
        assert (bench.etc / "offload/ssh" / guest.machine).read_bytes() == guest.client_key.read_bytes()
        assert (bench.etc / "offload/ssh" / guest.machine).stat().st_mode == 0o100600
        assert (inside / "signing-key.sec").stat().st_mode == 0o100400
        assert not (inside / "acl.comments").exists()
    assert (bench.etc / "offload/hook").stat().st_mode == 0o100755
    assert str(bench.etc / "offload/machines.scm") in (bench.etc / "machines.scm").read_text()


def test_what_is_told_is_what_is_written_and_undone(bench: Bench) -> None:
    before = bench.tree()
    told = [str(path.relative_to(bench.root)) for step in bench.steps() for path in step.wanted()]
    assert bench.tree() == before
    assert bench.set_up() == told
    made = {name for name, (_, content) in bench.tree().items() if content and name not in before}
    assert made <= set(told)
    assert set(told) - made == set()
    assert bench.set_up() == []
    assert bench.undo().keys() <= set(told)
    assert bench.tree() == before
    assert not bench.journal.exists()
    assert bench.undo() == {}


def test_a_user_s_files_come_back_byte_for_byte(bench: Bench) -> None:
    bench.etc.mkdir(parents=True)
    make_signing_key(bench.etc)
    key = read_public_key(bench.etc / "signing-key.pub")
    point = key.parameters[b"q"].hex()
    acl = f"(acl (entry (public-key (ecc (curve Ed25519) (q #{point}#))) (tag (guix import))))"
    (bench.etc / "acl").write_text(acl)
    (bench.etc / "acl").chmod(0o640)
    (bench.etc / "acl.comments").write_text(f"{64 * 'f'} of a key that is away\n")
    (bench.etc / "machines.scm").write_bytes(b"(define x '()) ; caf\xe9\nx")
    before = bench.tree()
    bench.set_up("one")
    bench.set_up("two")
    assert (bench.etc / "machines.scm").read_bytes().startswith(b"(define x '()) ; caf\xe9\n(append\nx\n")
    assert bench.undo("one") != {}
    assert Acl.read(bench.etc / "acl").entries[0].comment == "offload: two"
    assert (bench.etc / "offload/hook").exists()
    verdicts = bench.undo("two")
    assert verdicts["etc/guix/machines.scm"] == "restored"
    assert verdicts["etc/guix/acl"] == "restored"
    assert bench.tree() == before


def test_what_others_have_changed_since_is_left(bench: Bench) -> None:
    bench.set_up("one")
    with (bench.etc / "machines.scm").open("a") as file:
        file.write("; mine\n")
    make_signing_key(bench.root / "friend")
    friend = read_public_key(bench.root / "friend/signing-key.pub")
    with open_acl(bench.etc / "acl") as acl:
        acl.authorize(friend, "a friend")
    (bench.etc / "offload/hook").unlink()
    (bench.etc / "offload/mine").touch()
    verdicts = bench.undo()
    assert verdicts["etc/guix/machines.scm"] == "left: it has been changed since"
    assert verdicts["etc/guix/acl"] == "key taken out"
    assert verdicts["etc/guix/offload/hook"] == "was gone already"
    assert verdicts["etc/guix/offload/machines.scm"] == "removed"
    assert [entry.comment for entry in Acl.read(bench.etc / "acl").entries] == ["a friend", ""]
    assert (bench.etc / "offload/mine").exists()


def test_a_step_that_fails_leaves_what_was_done_until_then_undoable(bench: Bench) -> None:
    before = bench.tree()
    bench.guests[1].client_key.unlink()
    with pytest.raises(NotFoundError):
        bench.set_up()
    assert (bench.etc / "offload/ssh/one").exists()
    bench.guests[1].client_key.write_text("key of two\n")
    bench.undo()
    assert bench.tree() == before


class Killed(BaseException):
    """Nothing of ours is done after it."""


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_key_of_a_setup_that_was_killed_is_taken_out(
    bench: Bench, there: bool, changed: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the step of this host's ACL, before it was noted as done; `changed`: after the change, else after its comments."""
    if there:
        make_signing_key(bench.etc)
        (bench.etc / "acl").write_bytes(b"(acl )")
    before = bench.tree()
    acl, completed = bench.etc / "acl", journal._completed

    def complete(record: Record, keys: tuple[str, ...]) -> Record | None:
        if record.path == acl:
            raise Killed
        return completed(record, keys)

    def write(path: Path, *arguments: Any) -> None:
        if path == acl:
            raise Killed
        files.replace(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_completed", complete)
        if not changed:
            patched.setattr(acl_module, "replace", write)
        with pytest.raises(Killed):
            bench.set_up()
    guest = read_public_key(bench.root / "secrets/one/root/etc/guix/signing-key.pub")
    assert (bench.etc / "acl.comments").exists()
    assert (Acl.read(acl).find(guest) is not None) == changed
    if again:
        bench.set_up()
    bench.undo()
    assert Acl.read(acl).find(guest) is None
    assert bench.tree() == before
    assert not bench.journal.exists()


def test_a_record_of_an_interrupted_change_that_names_no_keys_is_still_read(bench: Bench) -> None:
    bench.journal.parent.mkdir()
    row: dict[str, object] = {"path": str(bench.root / "file"), "machine": "one", "before": None, "after": None, "keys": []}
    bench.journal.write_text(json.dumps({"version": 1, "originals": {}, "records": [row]}))
    (bench.root / "file").write_text("half")
    assert bench.undo() == {"file": "left: it has been changed since"}


@pytest.mark.parametrize("name", ["machines.scm", "acl"])
def test_what_the_system_makes_is_refused_before_anything_is_written(bench: Bench, name: str) -> None:
    """Guix System's files in /etc/guix are links into the store."""
    bench.etc.mkdir(parents=True)
    make_signing_key(bench.root / "friend")
    with open_acl(bench.root / "made/acl") as acl:
        acl.authorize(read_public_key(bench.root / "friend/signing-key.pub"))
    (bench.root / "made/machines.scm").write_text("'()\n")
    (bench.etc / name).symlink_to(bench.root / "made" / name)
    before = bench.tree()
    with pytest.raises(NotAllowedError, match="is a symbolic link"):
        bench.set_up()
    assert bench.tree() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory somebody else's")
@pytest.mark.parametrize("name", ["offload", "offload/ssh"])
def test_a_way_that_guix_daemon_s_user_has_bent_is_refused_before_anything_is_written(bench: Bench, name: str) -> None:
    bench.etc.mkdir(parents=True)
    target = bench.root / "target"
    target.mkdir()
    (bench.etc / name).parent.mkdir(exist_ok=True)
    (bench.etc / name).symlink_to(target)
    for path in (bench.etc, bench.etc / "offload", bench.etc / name):
        os.chown(path, 64_123, 64_123, follow_symlinks=False)
    before = bench.tree()
    with pytest.raises(NotAllowedError, match="is a symbolic link of another user"):
        bench.set_up()
    assert bench.tree() == before


def test_a_file_that_is_too_large_to_be_kept_is_not_touched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, it would be written back without its end."""
    for module in (journal, steps):
        monkeypatch.setattr(module, "MAX_SIZE", 1000)
    bench.etc.mkdir(parents=True)
    (bench.etc / "machines.scm").write_text("'() " + ";" * 1000)
    before = bench.tree()
    with pytest.raises(HostError, match="larger than 1000 bytes"):
        bench.set_up()
    assert bench.tree() == before


def test_two_setups_at_once_are_both_known(bench: Bench) -> None:
    """Each has read the journal before the other one wrote it."""
    both = [Journal(bench.journal), Journal(bench.journal)]
    for each, name in zip(both, "ab", strict=True):
        with each.recording("", [bench.root / name]):
            (bench.root / name).touch()
    assert bench.undo() == {"a": "removed", "b": "removed"}
    assert not bench.journal.exists()


def test_the_journal_has_no_private_key_in_it(bench: Bench) -> None:
    bench.set_up()
    assert bench.journal.stat().st_mode == 0o100600
    assert all(row["before"] is None for row in json.loads(bench.journal.read_text())["records"] if "/acl" not in row["path"])
    assert "key of one" not in bench.journal.read_text()


def test_a_machine_that_was_never_set_up(bench: Bench) -> None:
    bench.set_up("one")
    with pytest.raises(NotFoundError, match="two: nothing was set up"):
        bench.undo("two")


def test_a_journal_that_is_damaged(bench: Bench) -> None:
    bench.journal.parent.mkdir()
    bench.journal.write_text('{"records": 1}')
    with pytest.raises(HostError, match="is no journal"):
        bench.undo()


def test_nix_gets_one_line(tmp_path: Path) -> None:
    etc, journal = tmp_path / "nix", tmp_path / "state/nix.json"
    etc.mkdir()
    (etc / "nix.conf").write_text("cores = 2")
    assert list(perform(nix_steps(etc, b"hook"), Journal(journal))) == [
        etc / "offload/hook",
        etc / "offload/nix.conf",
        etc / "nix.conf",
    ]
    assert (etc / "nix.conf").read_text() == f"cores = 2\n!include {etc}/offload/nix.conf\n"
    assert list(perform(nix_steps(etc, b"hook"), Journal(journal))) == []
    assert len(list(Journal(journal).undo())) == 3
    assert [path.name for path in etc.rglob("*")] == ["nix.conf"]
    assert (etc / "nix.conf").read_text() == "cores = 2"


def test_nix_splits_at_blanks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="blanks"):
        nix_steps(tmp_path / "a b", b"")
