"""Finding and checking images that are there; making them is for tests/vm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from offloadd.digest import sparse_sha256
from offloadd.environment.recipe import environment_recipe
from offloadd.environment.store import EnvironmentStore
from offloadd.errors import ImageError, NotFoundError
from offloadd.image.store import Image, ImageStore
from offloadd.model.image import ImageRecipe

RECIPE = {"kind": "debian", "name": "debian", "suite": "bookworm", "kernel": "linux-image-cloud-amd64", "size": 1048576}


def place_image(root: Path, digest: str, made: str = "2026-01-01T00:00:00Z") -> Path:
    """An image as `build_image` leaves it, with other content."""
    directory = root / digest
    directory.mkdir(parents=True)
    files = {}
    for name in ("root.ext4", "vmlinuz", "initramfs.img"):
        (directory / name).write_bytes(name.encode() * 100)
        files[name] = {"size": (directory / name).stat().st_size, "sparse_sha256": sparse_sha256(directory / name)}
    manifest = {"name": "debian", "digest": digest, "recipe": RECIPE, "files": files, "made": made}
    (directory / "image.json").write_text(json.dumps(manifest | {"kernel_version": "6.1.0", "packages": {"sudo": "1"}}))
    return directory


@pytest.fixture
def image(tmp_path: Path) -> Image:
    place_image(tmp_path, "a" * 64)
    return ImageStore(tmp_path).show("debian")


def test_show_by_name_and_digest(tmp_path: Path, image: Image) -> None:
    store = ImageStore(tmp_path)
    assert store.find("a" * 64) == store.show("a" * 8) == image
    assert isinstance(image.recipe, ImageRecipe)
    assert image.recipe.size == 1048576
    assert image.boot.kernel == image.directory / "vmlinuz"
    assert json.loads(json.dumps(image.to_json()))["packages"] == {"sudo": "1"}
    for name in ("other", "aaaa", "b" * 64):
        with pytest.raises(NotFoundError, match="no such image"):
            store.show(name)


def test_a_damaged_manifest(tmp_path: Path, image: Image) -> None:
    (image.directory / "image.json").write_text("{")
    assert ImageStore(tmp_path).list() == []
    with pytest.raises(ImageError, match="manifest"):
        ImageStore(tmp_path).find(image.digest)


async def test_a_whole_image_is_read_once(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(tmp_path)
    await store.verify(image)

    def never(file: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr("offloadd.image.store.sparse_sha256", never)
    await store.verify(image)


async def test_damage_is_found(tmp_path: Path, image: Image) -> None:
    store = ImageStore(tmp_path)
    await store.verify(image)
    kernel = image.directory / "vmlinuz"
    content = kernel.read_bytes()
    kernel.write_bytes(b"X" + content[1:])
    os.utime(kernel, ns=(1, 1))
    with pytest.raises(ImageError, match="the content of vmlinuz") as caught:
        await store.verify(image)
    assert caught.value.hint == "offload image build --rebuild debian"
    kernel.write_bytes(content[1:])
    with pytest.raises(ImageError, match="bytes instead of"):
        await store.verify(image)
    kernel.unlink()
    with pytest.raises(ImageError, match="No such file"):
        await store.verify(image)


def test_environment_store_is_empty_at_first(tmp_path: Path) -> None:
    store = EnvironmentStore(tmp_path / "none")
    assert store.list() == []
    assert store.find(environment_recipe("bookworm", "amd64").digest) is None
