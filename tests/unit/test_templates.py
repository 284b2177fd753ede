"""Which templates are of use, and what is known of those that are not."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offloadd.daemon.templates import check_wanted, has_template, why_stale
from offloadd.errors import AgentError, NotFoundError, UsageError
from offloadd.model.image import FileImage, ImageRecipe
from offloadd.plan.machine import VmPlan, plan_for_build
from offloadd.template.freeze import MANIFEST, Look, check_processors, check_rate
from offloadd.template.key import machine_facts, template_key
from offloadd.template.store import TemplateStore

from .plans import day, facts, machine, plan

THE_BUILDS = {"cpu", "accelerator", "host_cpu", "qemu_version", "disk_slots", "image_file"}
"""What a machine's file does not decide, or what its QEMU's file says as well."""


def place_template(root: Path, digest: str, made_of: dict[str, Any], machine: str = "m") -> Path:
    """A template as `freeze` leaves it, with other content."""
    directory = root / digest
    directory.mkdir(parents=True)
    for name in ("ram", "state", "disk.qcow2"):
        (directory / name).write_bytes(name.encode() * 100)
    files = {name: {"size": 1, "sparse_sha256": ""} for name in ("ram", "state", "disk.qcow2")}
    manifest = {"digest": digest, "machine": machine, "facts": made_of, "files": files, "made": "2026-01-01T00:00:00Z"}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "qemu-system-x86_64"
    path.write_text("a binary")
    return path


def made_for(qemu: Path, **fields: Any) -> dict[str, Any]:
    """What the template of a build on that machine is made of."""
    return template_key(build_plan(qemu, **fields)).facts


def build_plan(qemu: Path, **fields: Any) -> VmPlan:
    own = plan(qemu=facts(binary=str(qemu)), **fields)
    return plan_for_build(own, "build-1", date=day("2012-06-01"), cpu=None, pinned_cpu=False)


@pytest.mark.parametrize("fields", [{}, {"cpu-count": 2, "memory-size": 512, "network": True, "options": ["-s"]}])
def test_the_machine_and_the_key_say_the_same(qemu: Path, fields: dict[str, Any]) -> None:
    made, told = made_for(qemu, **fields), machine_facts(machine(**fields), "abc", qemu)
    assert told == {name: value for name, value in made.items() if name not in THE_BUILDS}
    assert set(made) - set(told) == THE_BUILDS


def test_a_link_to_qemu_is_qemu(qemu: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(qemu)
    assert machine_facts(machine(), "abc", link) == machine_facts(machine(), "abc", qemu)


def test_who_has_a_template(qemu: Path) -> None:
    made = made_for(qemu)
    assert has_template(machine(), "abc", qemu, [{}, made])
    # Whatever the date: which CPU a build gets is found out when it is planned.
    assert has_template(machine(date="2020-01-01"), "abc", qemu, [made])
    assert not has_template(machine(), "abc", qemu, [])
    assert not has_template(machine(), "another", qemu, [made])
    assert not has_template(machine(), "", qemu, [{**made, "image_digest": ""}])
    assert not has_template(machine(template=False), "abc", qemu, [made])
    assert not has_template(machine("m", **{"cpu-count": 1}), "abc", qemu, [made])
    assert not has_template(machine(), "abc", qemu, [{**made, "disk_slots": 6}])
    assert not has_template(machine(), "abc", qemu.with_name("gone"), [made])
    qemu.write_text("a newer binary")
    assert not has_template(machine(), "abc", qemu, [made])


def test_why_a_template_is_stale(qemu: Path) -> None:
    made = made_for(qemu)

    def why(**changes: Any) -> str:
        now = machine_facts(machine(), "abc", qemu)
        return why_stale("m", made, {"m": {**now, **changes}})

    assert why() == ""
    assert why(image_digest="def") == "made from an older image"
    assert why(image_file=[1, 2]) == "made from an older image"
    assert why(qemu_file=[1, 2]) == "saved by another QEMU"
    assert why(format=99, memory_mib=1) == "made by another version of offload"
    assert why(memory_mib=1) == "the machine has another memory-size now"
    assert why(options=["-s"]) == "the machine has another options now"
    assert why_stale("m", made, {}) == "no machine needs it"
    other = machine_facts(machine("other"), "abc", qemu)
    assert why_stale("gone", made, {"other": other}) == "", "machines that are alike share it"


DEBIAN = ImageRecipe(kind="debian", name="debian", suite="bookworm", kernel="linux-image-amd64", size=1 << 30)


def test_a_machine_without_templates() -> None:
    check_wanted(machine(), DEBIAN)
    with pytest.raises(UsageError, match="template: false"):
        check_wanted(machine(template=False), DEBIAN)
    disk = FileImage.model_validate({"kind": "file", "name": "debian", "path": "disk"})
    with pytest.raises(UsageError, match="disk file: each of its guests is booted"):
        check_wanted(machine(), disk)


def test_what_is_known_of_all(tmp_path: Path) -> None:
    store = TemplateStore(tmp_path)
    assert store.known() == []
    place_template(tmp_path, "a" * 64, {"cpu": "x"})
    directory = place_template(tmp_path, "b" * 64, {"cpu": "y"})
    place_template(tmp_path, "c" * 64, {})
    (tmp_path / ("c" * 64) / MANIFEST).write_text("{")
    assert sorted(facts["cpu"] for facts in store.known()) == ["x", "y"]
    # Read once: a template never changes.
    (directory / MANIFEST).write_text("{")
    assert sorted(facts["cpu"] for facts in store.known()) == ["x", "y"]
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    assert [facts["cpu"] for facts in store.known()] == ["x"]


def test_by_its_digest_and_when_it_was_used(tmp_path: Path) -> None:
    store = TemplateStore(tmp_path)
    for digest in ("a" * 64, "ab" * 32):
        place_template(tmp_path, digest, {})
    os.utime(tmp_path / ("ab" * 32) / MANIFEST, (0, 86400))
    found = store.called("ab")
    assert (found.used, found.to_json()["used"]) == (86400, "1970-01-02T00:00:00Z")
    assert not store.is_loaded(found.digest)
    with pytest.raises(UsageError, match="several"):
        store.called("a")
    for beginning in ("", "c"):
        with pytest.raises(NotFoundError):
            store.called(beginning)


def test_cpu_and_accelerator_are_the_builds(qemu: Path) -> None:
    """Of one machine there are many templates."""
    one = template_key(build_plan(qemu))
    other = template_key(replace(build_plan(qemu), cpu="max"))
    assert one.digest != other.digest
    expected = {"m": machine_facts(machine(), "abc", qemu)}
    assert why_stale("m", one.facts, expected) == why_stale("m", other.facts, expected) == ""


class Guest:
    """Says how many processors it has."""

    machine = "m"

    def __init__(self, said: bytes) -> None:
        self.said = said

    async def run(self, program: str) -> tuple[int, bytes]:
        assert program == "/usr/bin/nproc"
        return 0, self.said


async def test_a_guest_that_lacks_a_processor_is_not_saved(qemu: Path) -> None:
    own = replace(build_plan(qemu), cpu_count=4)
    await check_processors(Guest(b"4\n"), own)  # type: ignore[arg-type]
    with pytest.raises(AgentError, match=r"^m: runs on 3 of its 4 processors$"):
        await check_processors(Guest(b"3\n"), own)  # type: ignore[arg-type]
    await check_processors(Guest(b"2\n"), replace(own, options=("-smp", "2")))  # type: ignore[arg-type]


def look(clock: float, earliest: float, latest: float) -> Look:
    return Look(clock=clock, earliest=earliest, latest=latest)


@pytest.mark.parametrize(
    ("passed", "right"),
    [
        (10.0, True),
        (10.4, True),
        (9.6, True),
        (11.5, True),
        (8.7, True),
        (12.1, False),
        (8.4, False),
        (32.7, False),
        (-1, False),
    ],
)
def test_a_clock_of_another_rate_is_not_saved(passed: float, right: bool) -> None:
    """Each look takes a second on this host, so that between 9 and 11 seconds have passed."""
    first, last = look(1000.0, 50.0, 51.0), look(1000.0 + passed, 60.0, 61.0)
    if right:
        check_rate(first, last, "m")
        return
    with pytest.raises(AgentError, match=rf"its clock went {passed:.1f} s in 11.0 s"):
        check_rate(first, last, "m")
