"""The guest's own modules, which are no part of a package here."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

GUEST = Path(__file__).parents[1] / "images/guest"


def load_guest_module(name: str) -> ModuleType:
    """For example `guest_agent.wire`."""
    sys.path.insert(0, str(GUEST))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(GUEST))
