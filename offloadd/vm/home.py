"""Where a running instance has its files, and where its logs go when it has ended."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from offloadd.errors import HostError
from offloadd.plan.argv import InstanceFiles

KEPT_LOGS = 10
"""Runs of which the logs are kept."""


def log_folder(runs: Path, kind: str = "") -> Path:
    """A folder below `runs` for the logs of one run; those of the oldest runs of that kind are dropped."""
    drop_old_logs(runs, f"*Z{kind}")
    return runs / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}{kind}"


def drop_old_logs(folder: Path, pattern: str = "*") -> None:
    """Make room for one run more among those in `folder` whose names fit `pattern`."""
    with suppress(OSError):  # somebody else drops them
        found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        for old in found[: -KEPT_LOGS + 1]:
            shutil.rmtree(old, ignore_errors=True)


class Home:
    """The directory of one instance.

    Args:
        logs: the directory that gets its logs; None: nobody wants them.
    """

    def __init__(self, files: InstanceFiles, logs: Path | None) -> None:
        self.files = files
        self._logs = logs

    def move(self, name: str, logs: Path) -> None:
        """Give it another name and another place for its logs.  QEMU does not notice: what it works with is open.

        Raises:
            OSError: an instance of that name has a directory already.
        """
        directory = self.files.directory.with_name(name)
        self.files.directory.rename(directory)
        self.files, self._logs = InstanceFiles(directory), logs

    def put_away(self) -> None:
        """Keep the logs, drop everything else.

        Raises:
            HostError: the logs cannot be kept.
        """
        try:
            if self._logs is not None:
                self._keep_logs(self._logs)
        except OSError as exc:
            raise HostError(f"cannot keep the logs: {exc.strerror}", subject=str(self._logs)) from exc
        finally:
            shutil.rmtree(self.files.directory, ignore_errors=True)

    def _keep_logs(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        for log in (self.files.console_log, self.files.qemu_log):
            if log.exists():
                # QEMU's user may be another machine's tomorrow.
                os.chown(log, os.geteuid(), os.getegid())
                shutil.move(log, logs / log.name)
