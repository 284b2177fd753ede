"""`offload image set`: the file that it writes."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from offload_cli.main import make_app
from offloadd.config.library import load_library
from offloadd.model.image import FileImage
from offloadd.paths import shipped

SHA = "a" * 64
DISK = bytes(510) + b"\x55\xaa" + bytes(512)
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("CONFIG_HOME", "STATE_HOME", "CACHE_HOME", "RUNTIME_DIR"):
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(DISK)
    (tmp_path / "disk.img.gz").write_bytes(gzip.compress(DISK))
    return lambda *words: CliRunner().invoke(make_app("image"), ["image", "set", *words])


def declared(tmp_path: Path, name: str) -> FileImage:
    image = load_library([shipped(), tmp_path / "config_home/offload"]).image(name)
    assert isinstance(image, FileImage)
    return image


def test_a_file_of_the_shipped_image(run: Run, tmp_path: Path) -> None:
    assert not declared(tmp_path, "hurd-debian").is_set_up
    result = run("hurd-debian", "disk.raw", "--size", "8G")
    assert result.exit_code == 0, result.output
    assert "offload image build hurd-debian" in result.output
    image = declared(tmp_path, "hurd-debian")
    assert (image.path, image.format, image.size) == (str(tmp_path / "disk.raw"), "raw", 8 << 30)
    assert (image.sha256, image.customize, image.is_set_up) == (None, "hurd-debian", True)
    # Another one in its place; what else the file says stays.
    assert run("hurd-debian", "disk.img.gz", "--sha256", "compute").exit_code == 0
    image = declared(tmp_path, "hurd-debian")
    assert image.sha256 == hashlib.sha256((tmp_path / "disk.img.gz").read_bytes()).hexdigest()
    assert (image.format, image.size) == (None, 8 << 30)
    url = "https://example.org/debian-hurd.img.tar.xz"
    assert run("hurd-debian", url, "--sha256", SHA.upper()).exit_code == 0
    image = declared(tmp_path, "hurd-debian")
    assert (image.path, image.url, image.sha256) == (None, url, SHA)


def test_an_image_of_another_name(run: Run, tmp_path: Path) -> None:
    result = run("mine", "disk.raw", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["fields"] == {"kind": "file", "path": str(tmp_path / "disk.raw"), "format": "raw"}
    assert declared(tmp_path, "mine").customize is None


def test_a_file_in_the_place_of_what_was_fetched(run: Run, tmp_path: Path) -> None:
    images = tmp_path / "config_home/offload/images"
    images.mkdir(parents=True)
    (images / "mine.yaml").write_text(f"kind: url\nurl: https://h/a.img\nsha256: {SHA}\n")
    assert run("mine", "disk.raw").exit_code == 0
    assert (declared(tmp_path, "mine").kind, declared(tmp_path, "mine").url) == ("file", None)


def test_what_the_file_is_like_counts_too(run: Run, tmp_path: Path) -> None:
    images = tmp_path / "config_home/offload/images"
    images.mkdir(parents=True)
    (images / "far.yaml").write_text(f"kind: url\nurl: https://h/a.img\nsha256: {SHA}\n")
    (images / "mine.yaml").write_text("like: far\n")
    result = run("mine", "disk.raw")
    assert result.exit_code == 2
    assert "takes `path` (kind file) or `url`, not both" in " ".join(result.output.split())
    assert declared(tmp_path, "mine").url == "https://h/a.img"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("hurd-guix", "gone.raw"), 5, "there is no such file"),
        (("hurd-guix", "."), 5, "there is no such file"),
        (("hurd-guix", "https://h/a.img"), 2, "needs its digest: --sha256 DIGEST"),
        (("hurd-guix", "https://h/a.img", "--sha256", "compute"), 2, "needs its digest"),
        (("hurd-guix", "https://h/a.img", "--sha256", "abc"), 2, "sha256"),
        (("hurd-guix", "ftp://h/a.img", "--sha256", SHA), 2, "must begin with https:// or http://"),
        (("hurd-guix", "disk.raw", "--size", "much"), 2, "'much' is not a size"),
        (("hurd-guix", "no-disk", "--size", "1G"), 75, "has no boot sector"),
        (("debian", "disk.raw"), 2, "is made from a recipe"),
        (("../x", "disk.raw"), 5, "nothing of that name"),
    ],
)
def test_what_is_refused_writes_nothing(run: Run, tmp_path: Path, words: tuple[str, ...], status: int, message: str) -> None:
    (tmp_path / "no-disk").write_bytes(bytes(1024))
    result = run(*words)
    assert result.exit_code == status, result.output
    assert message in result.output
    assert not (tmp_path / "config_home").exists()
