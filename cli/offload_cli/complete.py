"""Names for the shell's completion.  A daemon is asked when it runs, and never started."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from offloadd.errors import OffloadError


def machine_names(incomplete: str) -> list[str]:
    return _from_files("machines", incomplete)


def prefer_names(incomplete: str) -> list[str]:
    """Machines and kinds of machines."""
    from offloadd.model.kinds import KINDS

    return sorted({*machine_names(incomplete), *(kind for kind in KINDS if kind.startswith(incomplete))})


def vm_names(incomplete: str) -> list[str]:
    return _from_files("vms", incomplete)


def image_names(incomplete: str) -> list[str]:
    return _from_files("images", incomplete)


def system_names(incomplete: str) -> list[str]:
    from offloadd.model.system import SYSTEMS

    return [name for name in SYSTEMS if name.startswith(incomplete)]


def build_names(incomplete: str) -> list[tuple[str, str]]:
    """The ids of builds, with what they are."""
    rows = _ask("/v1/builds")
    found = [(str(row["build"]), f"{row['name']} {row['version']}: {row['state']}") for row in rows]
    return [(build, words) for build, words in found if build.startswith(incomplete)]


def environment_names(incomplete: str) -> list[tuple[str, str]]:
    """The digests of environments, with what they are."""
    rows = _ask("/v1/environments")
    found = [(str(row["digest"])[:12], f"{row['recipe']['suite']} {row['recipe']['architecture']}") for row in rows]
    return [(digest, words) for digest, words in found if digest.startswith(incomplete)]


def template_names(incomplete: str) -> list[tuple[str, str]]:
    """The digests of templates, with what they are."""
    rows = _ask("/v1/templates")
    found = [(str(row["digest"])[:12], f"{row['machine']} on {row['cpu']}") for row in rows]
    return [(digest, words) for digest, words in found if digest.startswith(incomplete)]


def quirk_names(incomplete: str) -> list[str]:
    """What `offload quirks` remembers."""
    return sorted({str(row["name"]) for row in _ask("/v1/quirks") if str(row["name"]).startswith(incomplete)})


def _ask(path: str) -> list[dict[str, Any]]:
    from offloadd.client import Client

    try:
        with Client() as client:
            rows: list[dict[str, Any]] = client.get(path) if client.paths.socket.exists() else []
            return rows
    except OffloadError:
        return []


def _from_files(kind: str, incomplete: str) -> list[str]:
    # The daemon reads the same files at each request: it knows no other names.
    from offloadd.config.library import load_library
    from offloadd.paths import find_paths

    try:
        library = load_library(find_paths().library)
    except OffloadError:
        return []
    known: dict[str, Iterable[str]] = {"machines": library.machines, "vms": library.vms, "images": library.images}
    names = known[kind]
    return sorted(name for name in names if name.startswith(incomplete))
