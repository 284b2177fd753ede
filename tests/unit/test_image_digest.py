"""What changes an image's digest, and the digest of sparse files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from offloadd.digest import json_digest, sparse_sha256
from offloadd.environment.recipe import environment_recipe
from offloadd.errors import ConfigError
from offloadd.image import digest as digests
from offloadd.image.digest import Digests, GuestContent, image_digest, read_guest_files
from offloadd.model.image import ImageRecipe

RECIPE: dict[str, Any] = {
    "kind": "debian",
    "name": "debian",
    "suite": "bookworm",
    "kernel": "linux-image-cloud-amd64",
    "packages": ["python3"],
    "size": "8G",
    "files": [{"path": "/a", "source": "a"}, {"path": "/b", "source": "sub/b", "mode": "0755"}],
}
FILES = (GuestContent(path="/a", mode=0o644, content=b"a"), GuestContent(path="/b", mode=0o755, content=b"b"))


def test_digest_ignores_the_order_of_files_only() -> None:
    recipe = ImageRecipe.model_validate(RECIPE)
    digest = image_digest(recipe, FILES)
    assert len(digest) == 64
    assert image_digest(recipe, FILES[::-1]) == digest
    assert image_digest(recipe.model_copy(update={"suite": "trixie"}), FILES) != digest
    for change in ({"path": "/c"}, {"mode": 0o600}, {"content": b"x"}):
        assert image_digest(recipe, (dataclasses.replace(FILES[0], **change), FILES[1])) != digest


def test_digest_stays_what_it_is() -> None:
    # A change here makes every user build every image anew: raise FORMAT only when the image changes too.
    assert json_digest({"b": [1, "é"], "a": None}) == "a44633ba036df25280e4fd9ef09da6f54dfe6d3611c755e31f993ab16f108f34"


def test_guest_files_are_read_with_their_modes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "sub/b").write_bytes(b"b")
    assert read_guest_files(ImageRecipe.model_validate(RECIPE), tmp_path) == FILES


def test_the_digest_is_worked_out_anew_when_anything_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    for name in ("a", "tree/b"):
        (tmp_path / name).write_text("old")
        os.utime(tmp_path / name, (1, 1))
    recipe = ImageRecipe.model_validate(
        RECIPE | {"files": [{"path": "/a", "source": "a"}, {"path": "/tree", "source": "tree"}]}
    )
    known = Digests()

    def right(recipe: ImageRecipe) -> str:
        digest = image_digest(recipe, read_guest_files(recipe, tmp_path))
        assert known.of(recipe, tmp_path) == digest
        return digest

    seen = [right(recipe)]
    with monkeypatch.context() as patch:
        patch.setattr(digests, "read_guest_files", None)
        assert known.of(recipe, tmp_path) == seen[0]
    for text in ("new", "one", "two"):  # all of one size, within a few milliseconds
        (tmp_path / "tree/b").write_text(text)
        seen.append(right(recipe))
    os.utime(tmp_path / "tree/b", (2, 2))  # from here on each is remembered
    assert right(recipe) == seen[-1]
    (tmp_path / "tree/c").write_text("")
    os.utime(tmp_path / "tree/c", (1, 1))
    seen.append(right(recipe))
    (tmp_path / "tree/c").rename(tmp_path / "tree/d")
    seen.append(right(recipe))
    seen.append(right(recipe.model_copy(update={"suite": "trixie"})))
    assert len(set(seen)) == len(seen)
    (tmp_path / "a").unlink()
    with pytest.raises(ConfigError):
        known.of(recipe, tmp_path)


def test_a_directory_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("one.py", "deep/two.py", "__pycache__/one.pyc", ".one.py.swp", "one.py~"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    (tmp_path / "other").write_text("other")
    files = [{"path": "/lib/x", "source": "tree", "mode": "0600"}, {"path": "/lib/x/one.py", "source": "other"}]
    recipe = ImageRecipe.model_validate(RECIPE | {"files": files})
    found = read_guest_files(recipe, tmp_path)
    assert found == (
        GuestContent(path="/lib/x/deep/two.py", mode=0o600, content=b"deep/two.py"),
        # The later entry counts.
        GuestContent(path="/lib/x/one.py", mode=0o644, content=b"other"),
    )
    digest = image_digest(recipe, found)
    (tmp_path / "tree/deep/two.py").write_text("changed")
    assert image_digest(recipe, read_guest_files(recipe, tmp_path)) != digest


def test_every_unreadable_guest_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_guest_files(ImageRecipe.model_validate(RECIPE), tmp_path)
    assert [problem.field for problem in caught.value.problems] == ["files: /a", "files: /b"]


def test_environment_digest_knows_no_order() -> None:
    one = environment_recipe("bookworm", "amd64", ["gcc", "make"])
    assert environment_recipe("bookworm", "amd64", ["make", "gcc", "make"]) == one
    assert environment_recipe("bookworm", "arm64", ["make", "gcc"]).digest != one.digest


def test_sparse_digest_sees_content_not_holes(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    with sparse.open("wb") as out:
        out.truncate(10 * 1024 * 1024)
        out.seek(5_000_000)
        out.write(b"data")
    full.write_bytes(sparse.read_bytes())
    assert sparse_sha256(sparse) == sparse_sha256(full)
    digest = sparse_sha256(sparse)
    with sparse.open("r+b") as out:
        out.seek(9_000_000)
        out.write(b"\1")
    assert sparse_sha256(sparse) != digest


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537])
def test_sparse_digest_knows_the_size(tmp_path: Path, size: int) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    for path, length in ((file, size), (other, size + 1)):
        path.touch()
        os.truncate(path, length)
    assert sparse_sha256(file) != sparse_sha256(other)
