"""`offload guix keys` and `offload guix acl`.  They are about files of this host, so no daemon is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.show import table
from offload_cli.terminal import clean, print_json, print_text, say, terminal_width
from offload_cli.words import json_option

if TYPE_CHECKING:
    from offloadd.guix.acl import Acl, Entry
    from offloadd.guix.key import PublicKey

keys = typer.Typer(help="The key that signs what this machine sends.", no_args_is_help=True, rich_markup_mode=None)
acl = typer.Typer(help="The list of keys whose store items this machine takes.", no_args_is_help=True, rich_markup_mode=None)

_DIRECTORY = typer.Option(
    None,
    "--directory",
    metavar="DIR",
    help="Where the files are; else $GUIX_CONFIGURATION_DIRECTORY, else /etc/guix.",
)
_FILES = typer.Argument(metavar="FILE...", help="Files with a public key; - is standard input.")
_WHICH = typer.Argument(metavar="KEY...", help="A fingerprint, the beginning of one, or a file with the public key.")


@keys.command()
def init(directory: Path | None = _DIRECTORY, as_json: bool = json_option()) -> None:
    """Make the signing key and an ACL with it, or what is missing of them.  What is there stays.

    The files belong to the owner of the store, who alone can read the private key.

    \b
    Examples:
      sudo offload guix keys init
      offload guix keys init --directory ./root/etc/guix
    """
    from offloadd.guix.acl import ACL, open_acl
    from offloadd.guix.files import owner_for
    from offloadd.guix.key import make_signing_key

    folder = _find_directory(directory)
    owner = owner_for(folder)
    pair = make_signing_key(folder, owner)
    path = folder / ACL
    made = list(pair.made)
    # One that is there stays as it is, even without this key: guix-daemon does not need it there.
    if not path.exists():
        with open_acl(path, owner):
            made.append(path)
    row = _key_row(folder, pair.public) | {"made": [str(file) for file in made]}
    if as_json:
        print_json(row)
        return
    for file in made:
        say(f"{file}: made")
    say(f"{'the key is' if made else 'nothing to do: the key is'} {row['fingerprint']}")


@keys.command()
def show(directory: Path | None = _DIRECTORY, as_json: bool = json_option()) -> None:
    """Show the public signing key and its fingerprint; the private one is not looked at.

    \b
    Example:
      offload guix keys show
    """
    from offloadd.errors import NotFoundError
    from offloadd.guix.key import PUBLIC_KEY, read_public_key

    folder = _find_directory(directory)
    try:
        key = read_public_key(folder / PUBLIC_KEY)
    except NotFoundError as exc:
        raise NotFoundError("there is no signing key", subject=str(folder), hint="offload guix keys init") from exc
    row = _key_row(folder, key)
    if as_json:
        print_json(row)
        return
    heading = {"file": row["file"], "kind": row["kind"], "fingerprint": row["fingerprint"]}
    print_text("\n".join(f"{field:<13}{value}" for field, value in heading.items()) + f"\n\n{row['public_key']}")


@acl.command()
def authorize(
    files: list[Path] = _FILES,
    comment: str = typer.Option("", "--comment", metavar="TEXT", help="Whose it is, for `acl list`; Guix does not see it."),
    directory: Path | None = _DIRECTORY,
    as_json: bool = json_option(),
) -> None:
    """Take what is signed by these keys.  An ACL that is not there is made, with the machine's own key in it.

    Comments are in the file `acl.comments` beside the ACL, which has no place for them.

    \b
    Examples:
      sudo offload guix acl authorize --comment "the build server" server.pub
      ssh server cat /etc/guix/signing-key.pub | sudo offload guix acl authorize -
    """
    from offloadd.guix.acl import ACL, open_acl
    from offloadd.guix.files import owner_for

    folder = _find_directory(directory)
    # All are read before the list is locked and changed: standard input may be slow, or wrong.
    wanted = [_read_key(file) for file in files]
    with open_acl(folder / ACL, owner_for(folder)) as found:
        news = [found.authorize(key, comment) for key in wanted]
    rows = [
        {"fingerprint": key.fingerprint, "change": "authorized" if new else "kept"}
        for key, new in zip(wanted, news, strict=True)
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        say(f"{row['fingerprint']}: {'authorized' if row['change'] == 'authorized' else 'is authorized already'}")
    _warn(found)


@acl.command("list")
def list_(directory: Path | None = _DIRECTORY, as_json: bool = json_option()) -> None:
    """List the keys, newest first: fingerprint, kind, comment, or the name by which this host knows the key.

    \b
    Example:
      offload guix acl list
    """
    from offloadd.guix.acl import ACL, Acl, known_names

    folder = _find_directory(directory)
    found = Acl.read(folder / ACL)
    names = known_names(folder)
    rows = [_entry_row(entry, names) for entry in found.entries]
    if as_json:
        print_json(rows)
        return
    print_text(_acl_table(rows, terminal_width()) if rows else f"{found.path}: no key is authorized.")
    _warn(found)


@acl.command()
def revoke(which: list[str] = _WHICH, directory: Path | None = _DIRECTORY, as_json: bool = json_option()) -> None:
    """Take keys out of the list.  What was imported before stays in the store.

    \b
    Examples:
      sudo offload guix acl revoke 3f9a27
      sudo offload guix acl revoke ./server.pub
    """
    from offloadd.guix.acl import ACL, open_acl
    from offloadd.guix.files import owner_for

    folder = _find_directory(directory)
    with open_acl(folder / ACL, owner_for(folder), make=False) as found:
        rows = [_entry_row(entry, {}) for one in which for entry in found.revoke(one)]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        say(f"{row['fingerprint']}: revoked" + (f" ({clean(row['comment'])})" if row["comment"] else ""))


def _find_directory(given: Path | None) -> Path:
    from offloadd.guix.files import configuration_directory

    return configuration_directory() if given is None else given


def _read_key(file: Path) -> PublicKey:
    from offloadd.guix.key import parse_public_key, read_public_key
    from offloadd.guix.sexp import MAX_SIZE

    if str(file) == "-":
        return parse_public_key(sys.stdin.buffer.read(MAX_SIZE + 1), "standard input")
    return read_public_key(file)


def _key_row(folder: Path, key: PublicKey) -> dict[str, Any]:
    from offloadd.guix.key import PUBLIC_KEY

    return {
        "file": str(folder / PUBLIC_KEY),
        "kind": key.kind,
        "fingerprint": key.fingerprint,
        "public_key": key.text.decode("utf-8", "backslashreplace"),
    }


def _warn(found: Acl) -> None:
    if not all(entry.is_understood for entry in found.entries):
        say(f"{found.path}: Guix refuses the whole list because of an entry with another tag than `(guix import)`")


def _entry_row(entry: Entry, names: dict[str, str]) -> dict[str, Any]:
    key = entry.key
    return {
        "fingerprint": key.fingerprint if key else None,
        "kind": key.kind if key else None,
        "comment": entry.comment or (names.get(key.fingerprint, "") if key else ""),
        "authorizes": entry.authorizes,
    }


def _acl_table(rows: list[dict[str, Any]], width: int | None) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        mark = "" if row["authorizes"] else "FOREIGN "
        return [row["fingerprint"] or "-", row["kind"] or "-", mark + row["comment"]]

    return table(["FINGERPRINT", "KIND", "COMMENT"], map(cells, rows), width)
