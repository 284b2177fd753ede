"""Disks that others have made: how they are described, and what is looked at before a QEMU gets one."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from offloadd.config.library import load_library
from offloadd.config.load import parse_value
from offloadd.errors import BootError, ConfigError, ImageError, NotFoundError
from offloadd.guest.open import _check_shown_clock
from offloadd.guest.ssh import Guest
from offloadd.image import disk_file
from offloadd.image.disk_file import Disk, file_digest, read_disk
from offloadd.model.image import FileImage
from offloadd.model.machine import SECRETS_PORT
from offloadd.paths import shipped
from offloadd.plan.machine import BootFiles, plan_vm
from offloadd.vm.instance import Instance
from offloadd.vm.overlay import write_overlay
from tests.unit.plans import facts, machine

SHA = "0" * 64


def image(**fields: object) -> FileImage:
    return FileImage.model_validate({"kind": "file", "name": "guix", **fields})


def boot_sector() -> bytes:
    return bytes(510) + b"\x55\xaa"


def qcow2(path: Path, **changes: int) -> Path:
    """An empty qcow2 file with some fields of its header changed."""
    fields = {"version": (4, ">I"), "backing": (8, ">Q"), "size": (24, ">Q"), "encryption": (32, ">I"), "features": (72, ">Q")}
    write_overlay(path, 1 << 20)
    data = bytearray(path.read_bytes())
    for name, value in changes.items():
        at, form = fields[name]
        struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: a\nurl: https://h/a\n", "takes `path` (kind file) or `url`, not both"),
        ("url: https://h/a\n", "needs the `sha256` of what is fetched from `url`"),
        (f"url: h/a\nsha256: '{SHA}'\n", "must begin with https:// or http://"),
        (f"url: file:///a\nsha256: '{SHA}'\n", "must begin with https:// or http://"),
        ("path: a\nformat: vmdk\n", "'vmdk' is not one of 'raw' or 'qcow2'"),
        ("path: a\nfirmware: efi\n", "'efi' is not one of 'bios'"),
        ("path: a\nsuite: sid\n", "unknown key"),
        ("path: a\nsize: 1000\n", "must be whole sectors of 512 bytes"),
        ("path: a\nsize: 0\n", "must be whole sectors"),
        ("path: a\nsize: 257G\n", "at most 256G"),
        ("path: a\ncustomize: hurd\n", "'hurd' is not one of 'hurd-debian'"),
    ],
)
def test_wrong_descriptions(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_value(f"kind: file\nname: guix\n{text}", "f.yaml", FileImage)
    assert message in caught.value.problems[0].message


def test_kind_url_is_kind_file_that_is_fetched() -> None:
    text = f"kind: url\nname: guix\nurl: https://h/a\nsha256: '{SHA}'\n"
    fetched = parse_value(text, "f.yaml", FileImage)
    assert file_digest(fetched, Path("/")) == file_digest(image(url="https://h/a", sha256=SHA), Path("/"))
    with pytest.raises(ConfigError, match="takes `path`"):
        parse_value("kind: url\nname: guix\npath: a\n", "f.yaml", FileImage)


def test_declared_but_not_set_up() -> None:
    shipped_images = load_library([shipped()]).images
    for name in ("hurd-guix", "hurd-debian"):
        declared = shipped_images[name]
        assert isinstance(declared, FileImage)
        assert not declared.is_set_up
        with pytest.raises(NotFoundError, match=f"^m: its image {name} is not set up$") as caught:
            declared.check_set_up("m")
        assert caught.value.hint == f"offload image set {name} FILE-OR-URL"
        with pytest.raises(NotFoundError, match="is not set up"):
            file_digest(declared, Path("/"))
    assert image(path="a").is_set_up
    image(path="a").check_set_up()


def test_the_digest_follows_what_is_done_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(**fields: object) -> str:
        return file_digest(image(**{"path": "a.img", "sha256": SHA} | fields), Path("/"))

    variants = [digest(), digest(path="a.img.xz"), digest(size="1G"), digest(customize="hurd-debian"), digest(format="raw")]
    assert len(set(variants)) == len(variants)
    monkeypatch.setattr(disk_file, "guest_files", lambda: {"/usr/lib/offload/secret-service": b"another"})
    assert digest() == variants[0]
    assert digest(customize="hurd-debian") != variants[3], "another version of ours is another image"


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_disk_beside_its_description(tmp_path: Path) -> None:
    write(tmp_path / "a", "images/guix.yaml", "kind: file\npath: guix.raw\n")
    write(tmp_path / "b", "images/two.yaml", "like: guix\nformat: raw\n")
    write(tmp_path / "b", "machines/m.yaml", "kind: build-vm\nimage: two\n")
    library = load_library([tmp_path / "a", tmp_path / "b"])
    assert library.folders == {"guix": tmp_path / "a/images", "two": tmp_path / "a/images"}
    assert library.image("two") == image(name="two", path="guix.raw", format="raw")


def test_machines_that_ask_too_much_of_it(tmp_path: Path) -> None:
    write(tmp_path, "images/guix.yaml", "kind: file\npath: guix.raw\n")
    write(tmp_path, "images/odd.yaml", "kind: fiel\npath: guix.raw\n")
    write(tmp_path, "machines/arm.yaml", "kind: emulated-vm\nimage: guix\nsystems: [aarch64-linux]\n")
    write(tmp_path, "machines/warm.yaml", "kind: build-vm\nimage: guix\nwarm: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_library([tmp_path])
    told = {(Path(problem.file).name, problem.line, problem.field): problem.message for problem in caught.value.problems}
    assert told.keys() == {("odd.yaml", 1, "kind"), ("arm.yaml", 2, "image"), ("warm.yaml", 3, "warm")}
    assert "is not a kind of image; did you mean" in told["odd.yaml", 1, "kind"]
    assert "which no aarch64-linux has" in told["arm.yaml", 2, "image"]


def test_formats_are_found_by_looking(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(boot_sector() + bytes(512))
    assert read_disk(raw, "guix") == Disk(format="raw", size=1024)
    assert read_disk(qcow2(tmp_path / "q"), "guix") == Disk(format="qcow2", size=1 << 20)
    assert read_disk(qcow2(tmp_path / "two", version=2, features=0xFF), "guix").size == 1 << 20, "version 2 has no such field"


def test_what_a_guest_wrote_into_its_first_sector_is_no_format_when_one_is_told(tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "q", backing=4096)
    data = bytearray(disk.read_bytes())
    data[510:512] = b"\x55\xaa"
    disk.write_bytes(data)
    assert read_disk(disk, "guix", "raw").format == "raw"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backing": 1}, "needs another file below it"),
        ({"features": 4}, "needs another file below it"),
        ({"encryption": 2}, "is encrypted"),
        ({"version": 4}, "version 4"),
        ({"size": 1000}, "no disk has 1000 bytes"),
        ({"size": 0}, "no disk has 0 bytes"),
    ],
)
def test_disks_that_lead_elsewhere(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_disk(qcow2(tmp_path / "q", **changes), "guix")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no boot sector"), (bytes(1024), "no boot sector"), (boot_sector() + b"x", "513 bytes")]
)
def test_what_is_no_disk(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "raw").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        read_disk(tmp_path / "raw", "guix")
    with pytest.raises(ImageError, match="is no qcow2 file"):
        read_disk(tmp_path / "raw", "guix", "qcow2")


def test_the_digest_follows_the_file_or_the_declared_content(tmp_path: Path) -> None:
    file = tmp_path / "guix.raw"
    file.write_bytes(b"1")
    by_file = file_digest(image(path="guix.raw"), tmp_path)
    assert file_digest(image(path=str(file)), Path("/elsewhere")) == by_file
    assert file_digest(image(path="guix.raw", name="other"), tmp_path) != by_file
    file.write_bytes(b"12")
    assert file_digest(image(path="guix.raw"), tmp_path) != by_file

    # Declared content is the same wherever it lies, and also when it is gone.
    declared = file_digest(image(path="gone", sha256=SHA), tmp_path)
    assert declared == file_digest(image(url="https://h/guix.raw", sha256=SHA), tmp_path)
    assert declared != file_digest(image(path="gone", sha256="1" * 64), tmp_path)


@pytest.mark.parametrize(("path", "message"), [("gone", "No such file"), (".", "is not a regular file")])
def test_a_file_that_is_not_there(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        file_digest(image(path=path), tmp_path)
    assert caught.value.problems[0].field == "path"
    assert message in caught.value.problems[0].message


def test_its_machine_forwards_the_port_for_secrets() -> None:
    disk = BootFiles(image="guix", digest="abc", disk=Path("/i/disk"), disk_size=1024)
    plan = plan_vm(machine(port_forwardings={11022: 22}), facts(), disk)
    assert plan.forwards == ((11022, 22), (0, SECRETS_PORT))
    assert plan.disk_slots == 0
    chosen = plan_vm(machine(port_forwardings={11022: 22, 11004: SECRETS_PORT}), facts(), disk)
    assert chosen.forwards == ((11004, SECRETS_PORT), (11022, 22))


class SaysClock:
    """A guest that answers `date`."""

    def __init__(self, status: int, output: bytes) -> None:
        self._said = status, output

    async def run(self, command: str) -> tuple[int, bytes]:
        assert command == "date +%s"
        await trio.lowlevel.checkpoint()
        return self._said


class Shows:
    """An instance whose clock is known."""

    name = "m"
    record = SimpleNamespace(clock=lambda: 1_577_836_800.0)


@pytest.mark.parametrize(
    ("status", "output", "fault"),
    [
        (0, b"1577836801\n", ""),
        (0, b"1577836800", ""),
        (0, b"1577836921\n", "its clock shows 1577836921 s since 1970, not 1577836800"),
        (0, b"1795000000\n", "its clock shows 1795000000"),
        (127, b"1\n", ""),
        (0, b"what?\n", ""),
        (0, "\u00b2".encode(), ""),
        (0, b"9" * 5000, ""),
    ],
)
async def test_a_clock_that_the_guest_has_moved(status: int, output: bytes, fault: str) -> None:
    guest, instance = cast("Guest", SaysClock(status, output)), cast("Instance", Shows())
    if not fault:
        await _check_shown_clock(guest, instance)
        return
    with pytest.raises(BootError, match=fault) as caught:
        await _check_shown_clock(guest, instance)
    assert "systemd" in caught.value.hint
