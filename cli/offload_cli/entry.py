"""The script `offload`: build hooks are taken before the command line is loaded, which takes longer than their work."""

from __future__ import annotations

import gc
import os
import sys

_GC_THRESHOLD = 50_000
"""Objects.  With Python's own, 700, loading modules has it look for garbage so often that a command takes 15 ms longer."""


def main() -> None:
    """Entry point."""
    gc.set_threshold(_GC_THRESHOLD)
    if len(sys.argv) > 1 and sys.argv[1] in ("guix-hook", "nix-hook") and sys.argv[2:] not in (["--help"], ["-h"]):
        be_hook(sys.argv[1], sys.argv[2:])
    from offload_cli.main import main as command_line

    command_line()


def be_hook(which: str, arguments: list[str]) -> None:
    """Run `guix-hook` or `nix-hook`; never returns."""
    if which == "guix-hook":
        from offloadd.hook.guix import run
    else:
        from offloadd.hook.nix import run
    try:
        status = run(arguments)
    except BrokenPipeError:
        status = 1  # the build daemon has gone: nobody wants the build any more
    except KeyboardInterrupt:
        status = 130
    except OSError as exc:
        sys.stderr.write(f"offload: {exc}\n")
        status = 1
    os._exit(status)
