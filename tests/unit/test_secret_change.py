"""Secrets that are made, shown and exchanged."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from offloadd.errors import HostError, NotAllowedError, UsageError
from offloadd.guest import secret_change
from offloadd.guest.guix_secrets import GUIX
from offloadd.guest.secret_change import SECRET_KINDS, SecretKind, init_secrets, rotate_secrets, secret_root_of
from offloadd.guest.secret_root import SecretRoot
from offloadd.guest.secret_view import describe_secrets
from offloadd.guix.acl import ACL, Acl, open_acl
from offloadd.guix.key import PRIVATE_KEY, PUBLIC_KEY, make_signing_key, read_public_key
from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import BuildVm, VmMachine

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
HOST = {f"etc/ssh/ssh_host_{kind}_key{end}" for kind in ("ed25519", "ecdsa") for end in ("", ".pub")}
CLIENT = {"etc/ssh/authorized_keys.d/offloading"}
OF_GUIX = {f"{GUIX}/{name}" for name in (PRIVATE_KEY, PUBLIC_KEY, ACL)}


def machine(kind: str = "childhurd", **fields: Any) -> VmMachine:
    model: type[VmMachine] = Childhurd if kind == "childhurd" else BuildVm
    return model.model_validate({"kind": kind, "name": "m", "image": "i", **fields})


@pytest.fixture(autouse=True)
def guix_of_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This host's Guix; nothing is in it."""
    folder = tmp_path / "etc-guix"
    monkeypatch.setenv("GUIX_CONFIGURATION_DIRECTORY", str(folder))
    return folder


def contents(secrets: SecretRoot) -> dict[str, bytes]:
    files = {str(path.relative_to(secrets.root)): path.read_bytes() for path in secrets.root.rglob("*") if path.is_file()}
    if secrets.client_key.exists():
        files["client"] = secrets.client_key.read_bytes()
    return files


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        (machine(), HOST | CLIENT | OF_GUIX | {"client"}),
        (machine(offloading=False), HOST),
        (machine("build-vm"), HOST | CLIENT | {"client"}),
        (machine("build-vm", daemons=("guix",)), HOST | CLIENT | OF_GUIX | {"client"}),
        (machine("build-vm", daemons=("nix",)), HOST | CLIENT | {"client"}),
    ],
)
def test_what_a_machine_gets(declared: VmMachine, names: set[str], tmp_path: Path) -> None:
    secrets = init_secrets(declared, tmp_path / "secrets")
    made = contents(secrets)
    assert set(made) == names
    assert secrets == secret_root_of(declared, tmp_path / "secrets")
    assert contents(init_secrets(declared, tmp_path / "secrets")) == made


def test_a_machine_without_offloading_gets_no_key_of_an_account_that_it_had_before(tmp_path: Path) -> None:
    assert init_secrets(machine(), tmp_path).withheld == ()
    secrets = init_secrets(machine(offloading=False), tmp_path)
    assert secrets.withheld == ("/etc/ssh/authorized_keys.d/offloading",)
    assert secrets.authorized_keys.exists()


def test_existing_secrets_stay(tmp_path: Path) -> None:
    root = tmp_path / "own"
    root.mkdir(mode=0o700)
    key = asyncssh.generate_private_key("ssh-ed25519", comment="mine")
    (root / "etc/ssh").mkdir(parents=True)
    (root / "etc/ssh/ssh_host_ed25519_key").write_bytes(key.export_private_key())
    signing = make_signing_key(root / GUIX).public
    (root / "etc/motd").write_text("hello")
    before = contents(SecretRoot(machine="m", root=root, client_key=tmp_path / "none"))
    secrets = init_secrets(machine(secret_root=str(root)), tmp_path / "secrets")
    assert before.items() <= contents(secrets).items()
    assert Acl.read(root / GUIX / ACL).find(signing)


def test_the_guest_trusts_what_this_host_trusts(tmp_path: Path, guix_of_host: Path) -> None:
    host = make_signing_key(guix_of_host).public
    other, sibling = (make_signing_key(tmp_path / name).public for name in ("other", "sibling"))
    with open_acl(guix_of_host / ACL) as acl:
        acl.authorize(other)
        acl.authorize(sibling, "offload: childhurd1")
    root = init_secrets(machine(), tmp_path / "secrets").root
    acl = Acl.read(root / GUIX / ACL)
    assert [entry.key for entry in acl.entries] == [host, other, read_public_key(root / GUIX / PUBLIC_KEY)]


def test_a_list_of_this_host_that_is_none_does_not_keep_a_machine_from_starting(tmp_path: Path, guix_of_host: Path) -> None:
    make_signing_key(guix_of_host)
    (guix_of_host / ACL).write_text("no list")
    assert (init_secrets(machine(), tmp_path / "secrets").root / GUIX / ACL).exists()


@pytest.mark.parametrize("kinds", [("host",), ("client",), ("guix",), ("host", "guix"), SECRET_KINDS])
def test_rotation_exchanges_what_it_is_told_to(kinds: tuple[SecretKind, ...], tmp_path: Path) -> None:
    secrets = init_secrets(machine(), tmp_path)
    before = contents(secrets)
    rotation = rotate_secrets(machine(), tmp_path, kinds, NOW)
    after = contents(secrets)
    of_kind = {"host": HOST, "client": CLIENT | {"client"}, "guix": OF_GUIX}
    assert {name for name in after if after[name] != before[name]} == set().union(*(of_kind[kind] for kind in kinds))
    assert after.keys() == before.keys()
    assert rotation.kinds == kinds
    assert rotation.backup == tmp_path / "m/old-20260301T123000Z"
    assert stat.S_IMODE(rotation.backup.stat().st_mode) == 0o700
    kept = {path.read_bytes() for path in rotation.backup.iterdir()}
    assert {before[name] for kind in kinds for name in of_kind[kind]} <= kept
    # Nothing of it goes into the guest.
    assert secrets.root not in rotation.backup.parents


def test_what_is_kept_is_as_private_as_it_was(tmp_path: Path) -> None:
    init_secrets(machine(), tmp_path)
    backup = rotate_secrets(machine(), tmp_path, SECRET_KINDS, NOW).backup
    for name in ("id_ed25519", "ssh_host_ed25519_key", "ssh_host_ecdsa_key"):
        assert stat.S_IMODE((backup / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((backup / PRIVATE_KEY).stat().st_mode) == 0o400


def test_the_users_own_keys_stay_authorized(tmp_path: Path) -> None:
    secrets = init_secrets(machine(), tmp_path)
    mine = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip() + " me@home\n"
    ours = secrets.authorized_keys.read_text()
    secrets.authorized_keys.chmod(0o644)
    secrets.authorized_keys.write_text(f"# a comment\n{ours}restrict {mine}")
    rotate_secrets(machine(), tmp_path, ["client"], NOW)
    lines = secrets.authorized_keys.read_text().splitlines(keepends=True)
    new = secrets.client_key.with_suffix(".pub").read_text().split()[:2]
    assert lines[:2] == ["# a comment\n", f"restrict {mine}"]
    assert [line.split()[:2] for line in lines[2:]] == [new]
    assert ours not in lines


def test_the_guests_own_list_follows_its_key(tmp_path: Path, guix_of_host: Path) -> None:
    host = make_signing_key(guix_of_host).public
    root = init_secrets(machine(), tmp_path / "secrets").root
    old = read_public_key(root / GUIX / PUBLIC_KEY)
    rotation = rotate_secrets(machine(), tmp_path / "secrets", ["guix"], NOW)
    new, acl = read_public_key(root / GUIX / PUBLIC_KEY), Acl.read(root / GUIX / ACL)
    assert rotation.old_signing_key == old.fingerprint
    assert (acl.find(old), bool(acl.find(new)), bool(acl.find(host))) == (None, True, True)


def test_rotation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no secrets of the kind guix"):
        rotate_secrets(machine("build-vm"), tmp_path, ["guix"], NOW)
    secrets = init_secrets(machine(), tmp_path)
    rotate_secrets(machine(), tmp_path, SECRET_KINDS, NOW)
    before = contents(secrets)
    with pytest.raises(NotAllowedError, match="a moment ago"):
        rotate_secrets(machine(), tmp_path, SECRET_KINDS, NOW)
    assert contents(secrets) == before


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_rotation_that_was_stopped_leaves_what_can_be_completed(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = init_secrets(machine(), tmp_path)
    before = contents(secrets)
    calls = 0

    def unlink(path: Path, *, missing_ok: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise PermissionError(13, "no", str(path))
        original(path, missing_ok=missing_ok)

    original = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(HostError, match="cannot rotate"):
            rotate_secrets(machine(), tmp_path, SECRET_KINDS, NOW)
    after = contents(init_secrets(machine(), tmp_path))
    assert after.keys() == before.keys()
    for public in secrets.host_keys:
        own = asyncssh.read_private_key(public.with_suffix("")).export_public_key().split()[:2]
        assert own == public.read_bytes().split()[:2]
    client = asyncssh.read_private_key(secrets.client_key).export_public_key().split()[1]
    assert client in secrets.authorized_keys.read_bytes()


def test_no_secret_is_shown(tmp_path: Path) -> None:
    secrets = init_secrets(machine(), tmp_path)
    rotation = rotate_secrets(machine(), tmp_path, SECRET_KINDS, NOW)
    shown = json.dumps(describe_secrets(secrets)) + repr(secrets) + repr(rotation)
    for path in [secrets.client_key, *secrets.root.rglob("*"), *rotation.backup.iterdir()]:
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) in (0o600, 0o400):
            lines = [line for line in path.read_text().splitlines() if len(line) > 30]
            assert lines
            assert not [line for line in lines if line in shown]


def test_what_is_shown(tmp_path: Path) -> None:
    secrets = secret_root_of(machine(), tmp_path)
    assert describe_secrets(secrets) | {"root": ""} == {"machine": "m", "root": "", "files": [], "client": [], "old": []}
    assert not (tmp_path / "m").exists()
    init_secrets(machine(), tmp_path)
    (secrets.root / "etc/link").symlink_to("/nowhere")
    (secrets.root / "etc/ssh/broken.pub").write_text("ssh-ed25519 A")
    (secrets.root / "etc/link").unlink()
    rows = {row["name"]: row for row in describe_secrets(secrets)["files"]}
    assert rows["/etc/guix/signing-key.sec"]["mode"] == "0400"
    assert rows["/etc/guix/signing-key.sec"]["fingerprints"] == []
    key = read_public_key(secrets.root / GUIX / PUBLIC_KEY)
    assert rows["/etc/guix/signing-key.pub"]["fingerprints"] == rows["/etc/guix/acl"]["fingerprints"] == [key.fingerprint]
    assert rows["/etc/ssh/broken.pub"]["fingerprints"] == []
    assert secret_change.SECRET_KINDS == ("host", "client", "guix")


def test_two_that_make_the_same_secrets_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: init_secrets(machine(), tmp_path), range(8)))
    for public in made[0].host_keys:
        own = asyncssh.read_private_key(public.with_suffix("")).export_public_key().split()[:2]
        assert own == public.read_bytes().split()[:2]
    assert len(made[0].authorized_keys.read_text().splitlines()) == 1
