"""What an archive's indexes of source packages (`Sources`, see Debian's RepositoryFormat) have, for hints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_FIELD = re.compile(rb"^(Package|Version|Binary): (.*(?:\n[ \t].*)*)$", re.MULTILINE)
_PIECE_BYTES = 8 * 1024**2


@dataclass(kw_only=True)
class SourceIndex:
    """Names of packages; versions are in the order of the indexes."""

    versions: dict[str, list[str]] = field(default_factory=dict)
    """Source package -> its versions."""
    sources: dict[str, str] = field(default_factory=dict)
    """Binary package -> the source package that makes it."""


def read_index(paths: Iterable[Path]) -> SourceIndex:
    """Read the uncompressed indexes `paths`; one that cannot be read is left out.  Blocks."""
    index = SourceIndex()
    for path in paths:
        try:
            with path.open("rb") as file:
                # Whole stanzas at a time: an index has some 60 MB.
                rest = b""
                while piece := file.read(_PIECE_BYTES):
                    whole, _, rest = (rest + piece).rpartition(b"\n\n")
                    _add(index, whole)
                _add(index, rest)
        except OSError:
            continue
    return index


def _add(index: SourceIndex, text: bytes) -> None:
    source = ""
    for match in _FIELD.finditer(text):
        value = match[2].decode(errors="replace")
        if match[1] == b"Package":
            source = value
        elif match[1] == b"Version":
            index.versions.setdefault(source, []).append(value)
        else:
            for binary in value.replace("\n", " ").split(","):
                index.sources.setdefault(binary.strip(), source)
