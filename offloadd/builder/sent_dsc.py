"""A .dsc with its files out of the tar that a request brought.

Whoever sent it is not trusted: plain files only, each one listed in the .dsc with its size and digest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from offloadd.builder.archive import MAX_PACKAGE_BYTES, SourcePackage, load_package
from offloadd.builder.dsc import MAX_DSC_BYTES, Dsc, DscFile, parse_dsc
from offloadd.builder.kept import open_partial, sweep
from offloadd.builder.tar import Kind, Member, TarError, TarReader
from offloadd.errors import SourceError
from offloadd.process import host_error


def take_sent(sent: Path, name: str, kept: Path) -> SourcePackage:
    """Keep what the tar `sent` holds in the folder `kept` (see `offloadd.builder.kept`).  Blocks.

    Args:
        name: of the .dsc in it.
    Raises:
        SourceError: the tar does not hold exactly the .dsc and the files that it lists.
        HostError: the disk is full.
    """
    try:
        sweep(kept)
        data = _read_dsc(sent, name)
        dsc = parse_dsc(data, name)
        if sum(file.size for file in dsc.files) > MAX_PACKAGE_BYTES:
            raise SourceError(f"its files are larger than {MAX_PACKAGE_BYTES >> 30} GiB", subject=name)
        own = DscFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        return load_package(_keep(sent, dsc, own, kept))
    except TarError as exc:
        raise SourceError(f"did not come in a tar that can be taken: {exc}", subject=name) from exc
    except OSError as exc:
        raise host_error(exc, name, kept) from exc


def _read_dsc(sent: Path, name: str) -> bytes:
    with sent.open("rb") as file:
        reader = TarReader(file)
        for member in reader:
            if member.name == name and member.kind is Kind.FILE:
                if member.size > MAX_DSC_BYTES:
                    raise SourceError(f"is larger than {MAX_DSC_BYTES >> 20} MiB, which no .dsc is", subject=name)
                return b"".join(reader.content())
    raise SourceError("did not come with the request", subject=name)


def _keep(sent: Path, dsc: Dsc, own: DscFile, kept: Path) -> list[Path]:
    """The paths of the kept files, the .dsc first."""
    missing = {file.name: file for file in (own, *dsc.files)}
    paths: dict[str, Path] = {}
    with sent.open("rb") as tar:
        reader = TarReader(tar)
        for member in reader:
            wanted = missing.pop(member.name, None)
            if wanted is None or not _fits(member, wanted):
                what = f"does not list {member.name[:100]!r} of {member.size} bytes, which came with it"
                raise SourceError(what, subject=own.name)
            with open_partial(kept, wanted.name, wanted.sha256, max_bytes=wanted.size) as growing:
                for piece in reader.content():
                    growing.write(piece)
                paths[wanted.name] = growing.keep(wanted.name, "the .dsc")
    if missing:
        raise SourceError(f"lists {', '.join(missing)}, which did not come with it", subject=own.name)
    return [paths[own.name], *(paths[file.name] for file in dsc.files)]


def _fits(member: Member, wanted: DscFile) -> bool:
    return member.kind is Kind.FILE and member.size == wanted.size
