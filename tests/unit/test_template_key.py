"""What a template is known by: all that must be the same in its clones, and nothing else."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from offloadd.plan.machine import BootFiles, QemuFacts, VmPlan, plan_for_build
from offloadd.plan.target import find_target
from offloadd.template import key as template_keys
from offloadd.template.key import DATE, plan_template, template_key

from .plans import BOOT, day, emulated_plan, facts, plan


@pytest.fixture
def qemu(tmp_path: Path) -> QemuFacts:
    path = tmp_path / "qemu-system-x86_64"
    path.write_text("a binary")
    return facts(binary=str(path))


@pytest.fixture
def whole(qemu: QemuFacts) -> VmPlan:
    return plan(qemu=qemu)


CHANGES: dict[str, Any] = {
    "system": "i686-linux",
    "cpu": "Haswell",
    "cpu_count": 3,
    "memory_mib": 1024,
    "network": True,
    "disk_slots": 6,
    "options": ("-device", "virtio-balloon-pci"),
}
NO_MATTER: dict[str, Any] = {
    "machine": "another",
    "instance": "build-1",
    "date": day("2012-01-01"),
    "forwards": (),
    "boot_timeout_s": 9.0,
    # Of a childhurd alone, of which there is no template.
    "volatile": False,
    "net_options": ("-nic", "none"),
    "secret_retries": 1,
    "secret_handshake_timeout_s": 1.0,
}
ELSEWHERE = {"boot", "qemu"}


def test_each_field_of_a_plan_is_thought_of() -> None:
    assert {field.name for field in fields(VmPlan)} == set(CHANGES) | set(NO_MATTER) | ELSEWHERE
    of_disk = {"disk", "disk_format", "disk_size"}
    assert {field.name for field in fields(BootFiles)} == of_disk | {"image", "digest", "disk_file", "kernel", "initramfs"}
    assert {field.name for field in fields(QemuFacts)} == {"binary", "version", "cpu_models", "accelerator", "tsc_khz"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_key(whole: VmPlan, name: str) -> None:
    assert getattr(whole, name) != CHANGES[name]
    assert template_key(replace(whole, **{name: CHANGES[name]})).digest != template_key(whole).digest


@pytest.mark.parametrize("name", NO_MATTER)
def test_what_does_not(whole: VmPlan, name: str) -> None:
    assert getattr(whole, name) != NO_MATTER[name]
    assert template_key(replace(whole, **{name: NO_MATTER[name]})) == template_key(whole)


def test_the_image_is_known_by_its_digest_and_its_file(whole: VmPlan) -> None:
    other = replace(BOOT, kernel=Path("/elsewhere/vmlinuz"), initramfs=Path("/elsewhere/i"), disk=Path("/elsewhere/d"))
    assert template_key(replace(whole, boot=other)) == template_key(whole)
    # The same recipe made anew has other files in other places of the disk.
    for change in ({"digest": "abd"}, {"image": "other"}, {"disk_file": (1, 2)}):
        assert template_key(replace(whole, boot=replace(BOOT, **change))).digest != template_key(whole).digest


@pytest.mark.parametrize("change", [{"version": "7.2.23"}, {"accelerator": "kvm"}, {"tsc_khz": 2600000}])
def test_qemu_is_known_by_its_version_and_accelerator(whole: VmPlan, qemu: QemuFacts, change: dict[str, Any]) -> None:
    assert template_key(replace(whole, qemu=replace(qemu, **change))).digest != template_key(whole).digest
    assert template_key(replace(whole, qemu=replace(qemu, cpu_models=frozenset()))) == template_key(whole)


def test_qemu_is_known_by_its_file(whole: VmPlan, qemu: QemuFacts, tmp_path: Path) -> None:
    """An update may keep the version."""
    binary = Path(qemu.binary)
    before, stat = template_key(whole).digest, binary.stat()
    binary.write_text("a binary!")
    os.utime(binary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    larger = template_key(whole).digest
    binary.write_text("a binary")
    os.utime(binary, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    later = template_key(whole).digest
    os.utime(binary, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len({before, larger, later}) == 3
    assert template_key(whole).digest == before
    binary.rename(tmp_path / "moved")
    os.utime(tmp_path / "moved", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert template_key(replace(whole, qemu=replace(qemu, binary=str(tmp_path / "moved")))).digest != before
    with pytest.raises(FileNotFoundError):
        template_key(whole)


def test_a_new_format_is_another_template(whole: VmPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_key(whole).digest
    monkeypatch.setattr(template_keys, "FORMAT", template_keys.FORMAT + 1)
    assert template_key(whole).digest != before


def test_a_new_machine_type_is_another_template(qemu: QemuFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = replace(emulated_plan("aarch64-linux", "cortex-a72"), qemu=qemu)
    before, target = template_key(arm), find_target(arm.system)
    assert before.facts["machine_type"] == target.machine
    monkeypatch.setattr(template_keys, "find_target", lambda _: replace(target, machine="virt-7.2"))
    assert template_key(arm).digest != before.digest


def test_all_dates_with_one_cpu_have_one_template(whole: VmPlan) -> None:
    def digest(date: str) -> str:
        return template_key(plan_for_build(whole, f"b-{date}", date=day(date), cpu=None, pinned_cpu=False)).digest

    assert digest("2012-02-01") == digest("2012-03-01") != digest("2013-08-01")


def test_the_plan_of_what_is_saved(whole: VmPlan) -> None:
    own = plan_for_build(whole, "build-1", date=day("2012-01-01"), cpu=None, pinned_cpu=False)
    made = plan_template(own, "template-1")
    assert made == replace(own, instance="template-1", date=DATE, forwards=())
    assert template_key(made) == template_key(own)
    # Older than what any build may find newer than its sources.
    assert day("2000-01-02") > DATE
