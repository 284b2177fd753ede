"""One build from the command line to its result: sent, followed, brought back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from offload_cli.follow import Ended, follow
from offload_cli.phases import Phases
from offload_cli.request import Request
from offload_cli.result import DEFAULT, FAILED, Result, keep_result
from offload_cli.target import Target
from offload_cli.terminal import Log, say
from offloadd.model.quantity import format_size

if TYPE_CHECKING:
    from offloadd.client import Client

_TELL_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Order:
    """One build as it was asked for, checked."""

    target: Target
    request: Request
    out: Path

    @property
    def exclude(self) -> tuple[Path, ...]:
        """What is ours in the source."""
        return own_files(self.out)


def own_files(out: Path) -> tuple[Path, ...]:
    """What is ours in a source: results, this one's and those in the usual place."""
    return (out.resolve(), Path(DEFAULT).resolve())


@dataclass(frozen=True, kw_only=True)
class Done:
    """A build that has ended."""

    ended: Ended
    kept: Result | None
    """None for one that was cancelled."""
    log: str
    """The last part of it."""

    def to_json(self) -> dict[str, Any]:
        return {**self.ended.result, **({"out": str(self.kept.directory)} if self.kept else {})}


class _Copied:
    """A log that is kept beside where it is shown."""

    def __init__(self, shown: Log, file: BinaryIO) -> None:
        self._shown = shown
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "replace"))
        self._shown.write(text)

    def end(self) -> None:
        self._shown.end()


def carry_out(client: Client, order: Order, phases: Phases, log: Log, created: Callable[[str], None]) -> Done:
    """Send the source, follow the build, keep its result.

    Args:
        created: is told the build's id.
    Raises:
        OffloadError: the build was refused, or its result cannot be kept.
        KeyboardInterrupt: after the build was cancelled.
    """
    with tempfile.TemporaryFile() as file:
        build = client.create_build(order.request, _packed(order, phases))
        created(build)
        ended = _follow_or_cancel(client, build, phases, _Copied(log, file))
        kept = None
        if ended.state != "cancelled":
            kept = keep_result(client, order.out, build, ended.result, file, outputs=_outputs(order, ended))
        file.seek(max(0, file.seek(0, 2) - 4096))
        return Done(ended=ended, kept=kept, log=file.read().decode(errors="replace"))


def _packed(order: Order, phases: Phases) -> Iterator[bytes]:
    """The source in pieces, with a word on how far it is."""
    sent, told = 0, time.monotonic()
    for piece in order.target.pieces(order.exclude):
        sent += len(piece)
        if time.monotonic() - told >= _TELL_EVERY_S:
            told = time.monotonic()
            phases.tell(f"sending the source ({format_size(sent)})", None)
        yield piece


def _follow_or_cancel(client: Client, build: str, phases: Phases, log: Log) -> Ended:
    try:
        return follow(client.stream("GET", f"/v1/builds/{build}/events"), phases, log)
    except KeyboardInterrupt:
        # Said after the terminal may be gone (SIGHUP); a second Ctrl-C leaves the rest to the daemon.
        with suppress(OSError):
            phases.pause()
            log.end()
            say("cancelling the build (Ctrl-C again: do not wait for it)")
        client.cancel_build(build)
        raise
    except BaseException:
        # Nobody follows it any more: standard error is closed, the connection broke.
        client.cancel_build(build)
        raise


def _outputs(order: Order, ended: Ended) -> str | None:
    """Where the outputs go inside of OUT; None when there is nothing that is whole."""
    if ended.state == "succeeded":
        return ""
    return FAILED if ended.state == "failed" and order.request["keep-failed"] else None
