"""The time-trap example on the host, at the host's date: the trap is there, and where it should be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

EXAMPLE = Path(__file__).parents[2] / "examples" / "time-trap"
CERTIFICATES = EXAMPLE / "tests" / "certificates"


@pytest.mark.parametrize("name", ["authority.pem", "server.pem"])
def test_certificate_dates(name: str) -> None:
    certificate = x509.load_pem_x509_certificate((CERTIFICATES / name).read_bytes())
    assert certificate.not_valid_before_utc == datetime(2019, 1, 1, tzinfo=UTC)
    assert certificate.not_valid_after_utc == datetime(2021, 1, 1, tzinfo=UTC)


def test_key_fits_and_says_what_it_is() -> None:
    pem = (CERTIFICATES / "server-key.pem").read_bytes()
    certificate = x509.load_pem_x509_certificate((CERTIFICATES / "server.pem").read_bytes())
    assert load_pem_private_key(pem, None).public_key() == certificate.public_key()
    assert b"test key" in pem.splitlines()[0]


def test_fails_today(tmp_path: Path) -> None:
    copy = shutil.copytree(EXAMPLE, tmp_path / "time-trap")
    command = [sys.executable, "-m", "unittest", "discover", "--start-directory", "tests", "--top-level-directory", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "certificate has expired" in done.stderr
    assert "Ran 3 tests" in done.stderr
    assert "FAILED (errors=1)" in done.stderr
