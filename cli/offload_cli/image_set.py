"""`offload image set`: says where the disk of an image is, in a file of the user's own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
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
    text = dump_yaml(fields)
    _check(name, text, file, paths)
    _write(file, text)
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
        kept = {key: value for key, value in read_document(file).values.items() if key not in _PLACE}
        # The other kind, `url`, takes no path.
        return kept | ({"kind": "file"} if "kind" in kept else {})
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


def _check(name: str, text: str, file: Path, paths: Paths) -> None:
    """Read it as it will be read: with what it is like, among the user's other images.

    Raises:
        UsageError: a value does not have the form that it must have.
    """
    from offloadd.config.library import load_library
    from offloadd.errors import ConfigError

    with tempfile.TemporaryDirectory(prefix="offload-image-") as folder:
        images = Path(folder, "images")
        images.mkdir()
        # Hidden ones are editors' own.
        for other in file.parent.glob("[!.]*.yaml"):
            shutil.copy(other, images)
        (images / file.name).write_text(text)
        try:
            load_library([*(known for known in paths.library if known != paths.config), Path(folder)])
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
