"""The way to the daemon for all commands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from offload_cli.phases import open_phases
from offload_cli.terminal import say
from offloadd.errors import DaemonError, error_from_json

if TYPE_CHECKING:
    from offloadd.client import Client

_PATIENCE_S = 1.0


@contextmanager
def open_client() -> Iterator[Client]:
    """A client of a daemon that answers; one is started when there is none.

    Raises:
        DaemonError: it does not come up.
    """
    from offloadd.client import Client

    with Client() as client:
        with patience("starting offloadd"):
            client.ensure_daemon()
        yield client


@contextmanager
def patience(text: str) -> Iterator[None]:
    """Say what is being done when the block takes longer than a moment."""
    notice = threading.Timer(_PATIENCE_S, say, [text])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


def show_work(client: Client, path: str, first: str, body: Any = None) -> dict[str, Any]:
    """Ask for what takes long and show its phases; what it gave.

    Args:
        first: what is being done until the daemon tells more.
        body: what is sent with it, as JSON.
    Raises:
        OffloadError: what went wrong in the daemon.
    """
    with open_phases() as phases:
        phases.tell(first, None)
        for event in client.stream("POST", path, body=body):
            match event.pop("event", None):
                case "phase":
                    phases.tell(str(event.get("text", "")), event.get("fraction"))
                case "error":
                    raise error_from_json(event)
                case "done":
                    return event
    raise DaemonError("ended in the middle of it", subject="offloadd", hint="offload daemon status")
