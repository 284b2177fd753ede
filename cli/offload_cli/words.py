"""What several commands say or take in the same way: options, help, the command after `--`."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand

from offloadd.errors import NotFoundError

EXIT_STATUSES = (
    "Exit statuses: 0 done, 1 the build failed, 2 wrong usage, 3 a file is wrong, 4 no machine can do this, 5 not found, "
    "6 not allowed, 75 a transient failure, 124 timed out, 130 interrupted."
)

TAIL = "offload.tail"


class WithCommand(TyperCommand):
    """A command whose last words, after `--`, are not ours: they are in `tail(ctx)` as they were written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[TAIL] = tuple(args[at + 1 :])
        parsed: list[str] = super().parse_args(ctx, args[:at])
        return parsed

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


def tail(ctx: typer.Context) -> tuple[str, ...]:
    """What stood after `--`."""
    words: tuple[str, ...] = ctx.meta.get(TAIL, ())
    return words


_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._+-]{0,63}")


def known_form(name: str) -> str:
    """A name that may stand in an address of the API: no machine, image or build has one of another form.

    Raises:
        NotFoundError: it has another.
    """
    if not _NAME.fullmatch(name):
        raise NotFoundError("there is nothing of that name", subject=repr(name))
    return name


def json_option() -> Any:
    return typer.Option(False, "--json", help="Print JSON, for programs.")
