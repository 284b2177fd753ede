"""Nix's list of build machines, read back."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from offloadd.errors import ConfigError, NotFoundError, Problem
from offloadd.model.found_offer import FoundOffer, Place, Placed, check_found

MAX_INCLUDES = 10


def read_nix(path: Path, taken: Set[str] = frozenset()) -> list[FoundOffer]:
    """The machines of a file, and of those that its lines `@FILE` name.  A file that such a line names may be missing.

    Mandatory features become features: our machines know no others.

    Args:
        taken: names that no machine may get.
    Raises:
        NotFoundError: there is no such file.
        ConfigError: lines that are wrong, all at once.
    """
    problems: list[Problem] = []
    found: list[FoundOffer] = []
    for file, lines in _files(path, _read_text(path), 0):
        entries: list[tuple[Placed, dict[str, Any], dict[str, Placed]]] = []
        for number, line in lines:
            try:
                entries.append((Place(number), _read_line(line), {}))
            except ValueError as exc:
                problems.append(Problem(file=file, line=number, field="", message=str(exc)))
        try:
            found += check_found(entries, file, "nix", [], taken | {offer.machine for _, offer in found})
        except ConfigError as exc:
            problems += exc.problems
    if problems:
        raise ConfigError(problems)
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as exc:
        raise NotFoundError(f"cannot be read: {exc.strerror}", subject=str(path)) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError([Problem(file=str(path), line=0, field="", message="is not UTF-8")]) from exc


def _files(path: Path, text: str, depth: int) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """The lines with something in them of a file and of those that it includes."""
    lines = []
    for number, whole in enumerate(text.split("\n"), 1):
        for line in (part.strip() for part in whole.partition("#")[0].split(";")):
            if not line.startswith("@"):
                lines += [(number, line)] if line else []
                continue
            included = path.parent / line[1:].strip()
            if depth >= MAX_INCLUDES:
                message = f"more than {MAX_INCLUDES} files include each other"
                raise ConfigError([Problem(file=str(path), line=number, field="", message=message)])
            if included.exists():
                yield from _files(included, _read_text(included), depth + 1)
    yield str(path), lines


def _read_line(line: str) -> dict[str, Any]:
    """The fields of one line.

    Raises:
        ValueError: it says too little, or something that cannot be.
    """
    columns = [*line.split(), *["-"] * 8][: max(8, len(line.split()))]
    if len(columns) > 8:
        raise ValueError("more than eight columns")
    uri, systems, key, builds, speed, features, mandatory, host_key = ("" if column == "-" else column for column in columns)
    address = urlsplit(uri if "://" in uri else f"ssh://{uri}")
    if address.scheme not in ("ssh", "ssh-ng") or not address.hostname:
        raise ValueError(f"{uri!r} is no ssh://HOST or ssh-ng://HOST")
    options = parse_qs(address.query)
    key = key or options.get("ssh-key", [""])[0]
    host_key = host_key or options.get("base64-ssh-public-host-key", [""])[0]
    for value, what in ((systems, "system types"), (key, "private key"), (host_key, "public host key")):
        if not value:
            raise ValueError(f"names no {what}, and a machine of ours has to")
    return {
        "host": _host(address),
        "port": address.port or 22,
        "user": address.username or "root",
        "host_key": _decode_key(host_key),
        "private_key": key,
        "systems": tuple(systems.split(",")),
        "parallel_builds": int(builds or 1),
        "speed": float(speed or 1),
        "features": tuple(dict.fromkeys(word for word in f"{features},{mandatory}".split(",") if word)),
        "overload_threshold": None,
    }


def _host(address: SplitResult) -> str:
    """As it is written: `hostname` has it in small letters."""
    host = address.netloc.rpartition("@")[2]
    return host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]


def _decode_key(text: str) -> str:
    try:
        words = b64decode(text, validate=True).decode().split()
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise ValueError("the public host key is no base64") from exc
    if len(words) < 2:
        raise ValueError("the public host key is not of the form `TYPE BASE64`")
    return " ".join(words[:2])
