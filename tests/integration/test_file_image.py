"""Disk files of others: taken into the store, and started by a PC's firmware."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trio

from offloadd.daemon.workshop import open_workshop
from offloadd.errors import BootError, ConfigError, ImageError
from offloadd.guest.open import open_by_ssh
from offloadd.guest.secret_root import ensure_secret_root
from offloadd.image.store import ImageStore
from offloadd.model.image import FileImage
from offloadd.model.machine import SECRETS_PORT
from offloadd.paths import Paths
from offloadd.plan.machine import BootFiles
from offloadd.process import silent
from offloadd.vm.overlay import write_overlay

from .bare_qemu import HALT, POWER_OFF, Bench, say, wait_for_console


def boot_sector(code: bytes) -> bytes:
    return code + bytes(510 - len(code)) + b"\x55\xaa"


DISK = boot_sector(say(b"booted\r\n") + HALT) + bytes(1 << 20)


def declare(**fields: object) -> FileImage:
    return FileImage.model_validate({"kind": "file", "name": "guix", **fields})


def found(path: Path) -> Callable[[], Awaitable[Path]]:
    async def find() -> Path:
        await trio.lowlevel.checkpoint()
        return path

    return find


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "guix.raw"
    path.write_bytes(DISK)
    # As in a store of Guix's: nobody may write there.
    path.chmod(0o444)
    return path


async def test_a_copy_is_kept_and_the_file_stays_as_it_was(tmp_path: Path, source: Path) -> None:
    store, declared = ImageStore(tmp_path / "images"), declare(path="guix.raw", sha256=hashlib.sha256(DISK).hexdigest())
    image = await store.keep(declared, tmp_path, found(source))
    assert image.boot == BootFiles(
        image="guix", digest=image.digest, disk=image.directory / "disk", disk_format="raw", disk_size=len(DISK)
    )
    assert image.boot.disk.read_bytes() == source.read_bytes() == DISK
    await store.verify(image)
    assert store.find(image.digest) == store.show("guix") == image

    # It is there: nobody looks at the file again, which may be gone.
    source.unlink()
    assert await store.keep(declared, tmp_path, found(source)) == image
    image.boot.disk.write_bytes(b"X" + DISK[1:])
    with pytest.raises(ImageError, match="the content of disk"):
        await ImageStore(tmp_path / "images").verify(image)


async def test_another_content_than_was_declared(tmp_path: Path, source: Path) -> None:
    store, declared = ImageStore(tmp_path / "images"), declare(path="guix.raw", sha256="0" * 64)
    with pytest.raises(ImageError, match=f"its SHA-256 is {hashlib.sha256(DISK).hexdigest()}") as caught:
        await store.keep(declared, tmp_path, found(source))
    assert caught.value.subject == "guix"
    assert store.list() == []


async def test_a_file_that_is_written_to_while_it_is_copied(tmp_path: Path, source: Path) -> None:
    store = ImageStore(tmp_path / "images")
    source.chmod(0o644)

    async def find() -> Path:
        await trio.lowlevel.checkpoint()
        return source

    def write(phase: str, fraction: float | None) -> None:
        if phase.startswith("copying"):
            with source.open("ab") as file:
                file.write(bytes(512))

    with pytest.raises(ImageError, match="was changed while it was copied"):
        await store.keep(declare(path="guix.raw"), tmp_path, find, write)
    assert store.list() == []


async def test_a_file_that_is_no_disk(tmp_path: Path, source: Path) -> None:
    store = ImageStore(tmp_path / "images")
    source.chmod(0o644)
    source.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(ImageError, match="has no boot sector"):
        await store.keep(declare(path="guix.raw"), tmp_path, found(source))
    assert store.list() == []


def write_qcow2(path: Path, content: bytes) -> None:
    """A qcow2 file with one cluster of data."""
    write_overlay(path, 1 << 20)
    data = bytearray(path.read_bytes())
    # After the header, the counts and the first table: the second table, and what is in the disk's first cluster.
    data += struct.pack(">Q", 1 << 63 | 5 << 16).ljust(1 << 16, b"\0") + content[: 1 << 16]
    struct.pack_into(">Q", data, 3 << 16, 1 << 63 | 4 << 16)
    struct.pack_into(">6H", data, 2 << 16, *[1] * 6)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_the_firmware_starts_its_boot_sector(tmp_path: Path, bench: Bench, kind: str) -> None:
    file = tmp_path / "file"
    if kind == "raw":
        file.write_bytes(DISK)
    else:
        write_qcow2(file, DISK)
    image = await ImageStore(tmp_path / "images").keep(declare(path="file"), tmp_path, found(file))
    assert image.boot.disk_format == kind
    before = image.boot.disk.read_bytes()

    plan = replace(bench.plan(), boot=image.boot, disk_slots=0)
    async with bench.open(plan) as instance:
        await wait_for_console(instance, "booted")
        assert not instance.files.agent.exists()
    bench.assert_nothing_left()
    assert image.boot.disk.read_bytes() == before


async def admit(bench: Bench, tmp_path: Path, code: bytes, *, limit_s: float) -> BootError:
    """What comes of a guest that does no more than `code`."""
    file = tmp_path / "file"
    file.write_bytes(boot_sector(say(b"nobody\r\n") + code) + bytes(1 << 20))
    image = await ImageStore(tmp_path / "images").keep(declare(path="file"), tmp_path, found(file))
    secrets = ensure_secret_root("m", tmp_path / "secrets")
    plan = replace(bench.plan(), boot=image.boot, disk_slots=0, forwards=((0, 22), (0, SECRETS_PORT)), boot_timeout_s=limit_s)
    phases: list[str] = []
    with pytest.raises(BootError) as caught:
        async with bench.open(plan) as instance:
            await wait_for_console(instance, "nobody")
            async with open_by_ssh(instance, secrets, bench.bridge, phases.append):
                pytest.fail("nobody is there")
    assert phases == ["waiting for its secret service"]
    bench.assert_nothing_left()
    return caught.value


async def test_a_disk_without_a_secret_service(tmp_path: Path, bench: Bench) -> None:
    error = await admit(bench, tmp_path, HALT, limit_s=1)
    assert error.what == "not ready after 1 s: its secret service gave no hello"
    assert error.subject == "m"
    assert "nobody" in error.detail
    assert "offload vm console m" in error.hint


async def test_a_disk_whose_guest_ends(tmp_path: Path, bench: Bench) -> None:
    error = await admit(bench, tmp_path, POWER_OFF, limit_s=60)
    assert error.what.startswith("the machine stopped")


async def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    declared = declare(path="fifo", sha256="0" * 64)
    with trio.fail_after(10), pytest.raises(ConfigError, match="is not a regular file"):
        await ImageStore(tmp_path / "images").keep(declared, tmp_path, found(tmp_path / "fifo"))


async def test_a_disk_that_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web/guix.raw").write_bytes(DISK)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "web")
    config, sha256 = tmp_path / "config", hashlib.sha256(DISK).hexdigest()
    (config / "images").mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/guix.raw"
        (config / "images/guix.yaml").write_text(f"kind: file\nurl: {url}\nsha256: '{sha256}'\n")
        paths = Paths(config=config, state=tmp_path / "state", cache=tmp_path / "cache", runtime=tmp_path / "run")
        async with open_workshop(paths, tmp_path / "offload.sqlite") as shop:
            image = await shop.image(shop.library(), "guix", silent)
        server.shutdown()
    assert image.boot.disk.read_bytes() == DISK
