"""The real sshd of this host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def find_sshd() -> str:
    """Its path; and where it separates privileges, Debian's service, which need not run, would have made the directory."""
    assert SSHD, "openssh-server is not installed"
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return SSHD
