"""Where a running instance has its files, and where its logs go when it has ended."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from offloadd.errors import HostError
from offloadd.plan.argv import InstanceFiles


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
