"""`offload image set`: says where the disk of an image is, in a file of the user's own."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload_cli.complete import image_names
from offload_cli.terminal import print_json, say
from offload_cli.words import json_option, known_form
from offloadd.errors import HostError, NotFoundError, UsageError

if TYPE_CHECKING:
    from offloadd.paths import Paths

_COMPUTE = "compute"
_PLACE = ("path", "url", "sha256", "format")
"""What says where the disk is; the other fields of a file that is there stay."""
_PIECE = 1 << 20


def set_(
    name: str = typer.Argument(metavar="NAME", callback=known_form, autocompletion=image_names, help="The image's name."),
    place: str = typer.Argument(metavar="FILE-OR-URL", help="A disk, raw or qcow2, or one compressed or alone in a tar."),
    sha256: str = typer.Option("", "--sha256", metavar="DIGEST", help="Of the file as it lies there; `compute`: look at it."),
    size: str = typer.Option("", "--size", metavar="SIZE", help="Make the disk that large, e.g. 8G, when it is smaller."),
    as_json: bool = json_option(),
) -> None:
    """Say where an image's disk is.

    \b
    Examples:
      offload image set hurd-guix ./childhurd.qcow2
      offload image set hurd-debian https://example.org/debian-hurd.img.tar.xz --sha256 DIGEST --size 8G
    """
    from offloadd.config.document import dump_yaml
    from offloadd.paths import find_paths

    paths = find_paths()
    file = paths.config / "images" / f"{name}.yaml"
    fields = _base(name, file, paths)
    fields |= _from_url(place, sha256) if "://" in place else _from_file(name, Path(place), sha256)
    fields |= {"size": size} if size else {}
    _check(name, fields, str(file))
    _write(file, dump_yaml(fields))
    if as_json:
        print_json({"image": name, "file": str(file), "fields": fields})
    else:
        say(f"written: {file}")
        say(f"next: offload image build {name}")


def _base(name: str, file: Path, paths: Paths) -> dict[str, Any]:
    """What the user's file says already, but for the place; else that it is like the shipped one, or an image of its own."""
    from offloadd.config.document import read_document
    from offloadd.config.library import load_library
    from offloadd.model.image import FileImage

    known = load_library(paths.library).images.get(name)
    if known is not None and not isinstance(known, FileImage):
        raise UsageError("is made from a recipe, not from a disk", subject=f"image {name}", hint="choose another name")
    if file.exists():
        return {key: value for key, value in read_document(file).values.items() if key not in _PLACE}
    return {"like": name} if known else {"kind": "file"}


def _from_url(url: str, sha256: str) -> dict[str, Any]:
    if sha256 in ("", _COMPUTE):
        hint = "the site says it beside the file: SHA256SUMS"
        raise UsageError("what is fetched needs its digest: --sha256 DIGEST", subject=url, hint=hint)
    return {"url": url, "sha256": sha256.lower()}


def _from_file(name: str, given: Path, sha256: str) -> dict[str, Any]:
    from offloadd.image.disk_file import read_disk
    from offloadd.image.unpack import packing

    path = given.expanduser().resolve()
    try:
        if not path.is_file():
            raise NotFoundError("there is no such file", subject=str(given))
        # What a guest wrote later says nothing of the format; what a compressed file has in it is looked at when it is built.
        fields = {} if packing(path.name) else {"format": read_disk(path, name).format}
        digest = _digest(path) if sha256 == _COMPUTE else sha256.lower()
    except OSError as exc:
        raise NotFoundError(f"cannot be read: {exc.strerror}", subject=str(given)) from exc
    return {"path": str(path)} | ({"sha256": digest} if digest else {}) | fields


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file, typer.progressbar(length=total, label=f"reading {path.name}") as bar:
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _check(name: str, fields: dict[str, Any], file: str) -> None:
    """Raises: UsageError: a value does not have the form that it must have."""
    from offloadd.config.document import dump_yaml
    from offloadd.config.load import parse_value
    from offloadd.errors import ConfigError
    from offloadd.model.image import FileImage

    told = {key: fields[key] for key in (*_PLACE, "size") if key in fields}
    try:
        parse_value(dump_yaml({"kind": "file", "name": name} | told), file, FileImage)
    except ConfigError as exc:
        wrong = "; ".join(f"{problem.field} {problem.message}".strip() for problem in exc.problems)
        raise UsageError(re.sub(r"\s+", " ", wrong), subject=f"image {name}") from exc


def _write(file: Path, text: str) -> None:
    """Whole or not at all: the daemon reads it whenever it likes."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".image-", delete=False) as out:
            out.write(text)
            os.fchmod(out.fileno(), 0o644)
        Path(out.name).replace(file)
    except OSError as exc:
        raise HostError(f"cannot be written: {exc.strerror}", subject=str(file)) from exc
