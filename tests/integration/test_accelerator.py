"""The probe of KVM, with programs in QEMU's place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from offloadd.vm import accelerator
from offloadd.vm.accelerator import Verdict, find_accelerator


class Host:
    """A host with a device and a QEMU of our making."""

    def __init__(self, root: Path) -> None:
        self.cache = root / "state/accelerator.json"
        self.device = root / "kvm"
        self.device.touch()
        self.qemu = root / "qemu"
        self.calls = root / "calls"
        self.calls.touch()

    def says(self, script: str) -> None:
        self.qemu.write_text(f'#!/bin/sh\necho "$@" >> {self.calls}\n{script}\n')
        self.qemu.chmod(0o755)

    async def find(self) -> Verdict:
        with trio.fail_after(20):
            return await find_accelerator(self.qemu, Path("/vmlinuz"), self.cache, device=self.device)

    @property
    def probes(self) -> int:
        return len(self.calls.read_text().splitlines())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


async def test_a_kernel_that_starts(host: Host) -> None:
    # Letter by letter, as a serial port does it; it would run on for ever.
    host.says("for c in Linux ' ' ver sion; do printf '%s' \"$c\"; sleep 0.05; done; exec sleep 60")
    verdict = await host.find()
    assert (verdict.accelerator, verdict.reason) == ("kvm", "a kernel started under KVM")
    assert "-accel kvm" in host.calls.read_text()
    assert "-kernel /vmlinuz" in host.calls.read_text()


@pytest.mark.parametrize("script", ["exec sleep 60", "echo Linux; exec sleep 60", "exit 1", "echo no KVM >&2; exit 1"])
async def test_a_device_that_exists_and_is_useless(host: Host, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "PROBE_S", 1.0)
    host.says(script)
    verdict = await host.find()
    assert verdict.accelerator == "tcg"
    assert "printed nothing within" in verdict.reason


async def test_no_device(host: Host) -> None:
    host.says("echo Linux version")
    host.device.unlink()
    verdict = await host.find()
    assert (verdict.accelerator, verdict.reason) == ("tcg", f"there is no {host.device}")
    assert host.probes == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
async def test_a_device_that_may_not_be_opened_is_tried_again_later(host: Host) -> None:
    host.says("echo Linux version")
    host.device.chmod(0)
    verdict = await host.find()
    assert "may not be opened" in verdict.reason
    host.device.chmod(0o600)
    assert (await host.find()).accelerator == "kvm"


async def test_the_verdict_is_kept_for_this_boot_and_this_qemu(host: Host) -> None:
    host.says("echo Linux version")
    assert await host.find() == await host.find()
    assert host.probes == 1
    os.utime(host.qemu, (1, 1))
    await host.find()
    assert host.probes == 2
    text = host.cache.read_text()
    host.cache.write_text(text.replace('"boot_id": "', '"boot_id": "another'))
    await host.find()
    assert host.probes == 3
    host.cache.write_text("half a verd")
    assert (await host.find()).accelerator == "kvm"
    assert host.probes == 4


async def test_a_device_that_vanishes_or_appears_is_noticed(host: Host) -> None:
    host.says("echo Linux version")
    assert (await host.find()).accelerator == "kvm"
    host.device.unlink()
    assert (await host.find()).accelerator == "tcg"
    host.device.touch()
    assert (await host.find()).accelerator == "kvm"
    host.cache.unlink()
    host.device.unlink()
    assert (await host.find()).accelerator == "tcg"
    host.device.touch()
    assert (await host.find()).accelerator == "kvm"
