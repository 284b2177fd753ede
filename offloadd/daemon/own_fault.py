"""An error of offload itself: it ends the one build or machine that met it, and is told where it can be looked for."""

from __future__ import annotations

import traceback

import structlog

from offloadd.errors import DaemonError

log = structlog.get_logger()


def own_fault(exc: Exception, subject: str) -> DaemonError:
    """The error for whoever waits; the daemon's log gets the place."""
    where = "".join(traceback.format_exception(exc))
    log.error("an error of offload itself", subject=subject, error=repr(exc)[:300], where=where)
    hint = "offload's log says where (offload daemon status names it): please report it"
    return DaemonError(f"an error of offload itself: {repr(exc)[:300]}", subject=subject, hint=hint)
