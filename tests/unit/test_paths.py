"""Directories of ours, and those of others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offloadd.errors import NotAllowedError
from offloadd.paths import check_ours


def test_a_directory_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_ours(tmp_path)
    check_ours(tmp_path / "nothing")
    # Root's is trusted, whoever we are.
    check_ours(Path("/"))
    (tmp_path / "link").symlink_to("/")
    owner = tmp_path.stat().st_uid
    if owner == 0:
        os.chown(tmp_path, 61000, 61000)
        os.chown(tmp_path / "link", 61000, 61000, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    for name in (tmp_path, tmp_path / "link"):
        with pytest.raises(NotAllowedError, match="another user"):
            check_ours(name)
