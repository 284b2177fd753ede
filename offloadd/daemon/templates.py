"""Templates as somebody asks for them by hand; builds make their own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from offloadd.daemon.guests import KEEP_TEMPLATES_S, Guests
from offloadd.daemon.workshop import Workshop
from offloadd.errors import OffloadError, UsageError
from offloadd.model.image import FileImage, ImageDeclaration
from offloadd.model.machine import VmMachine
from offloadd.model.template import TemplateRequest
from offloadd.plan.machine import DISKS_OF_A_CLONE, default_qemu, plan_for_build
from offloadd.process import Progress
from offloadd.template.key import image_file, machine_facts, template_key
from offloadd.template.load import Template

_DIFFERENCES = {
    "image_digest": "made from an older image",
    "image_file": "made from an older image",
    "image": "made from another image",
    "qemu": "saved by another QEMU",
    "qemu_file": "saved by another QEMU",
    "format": "made by another version of offload",
}
"""What is said of those that have another fact than their machine."""
_FIELDS = {"memory_mib": "memory-size", "cpu_count": "cpu-count", "machine_type": "machine type"}
"""What the other facts are called in a machine's file, where not the same."""

Expected = Mapping[str, dict[str, Any]]
"""Name of a machine -> what a template of it must be made of now."""


async def make_template(guests: Guests, request: TemplateRequest, progress: Progress, *, rebuild: bool) -> Template:
    """The template that builds on that machine would use, made when it is missing.

    Raises:
        NotFoundError: there is no such machine.
        UsageError: its file says that it has none.
        BootError, MachineLostError, ImageError, HostError, NoMachineError: it cannot be made.
    """
    shop = guests.shop
    library = shop.library()
    machine = library.vm(request.machine)
    check_wanted(machine, library.image(machine.image))
    own = await shop.plan(machine, library, progress)
    plan = plan_for_build(own, own.instance, date=request.date, cpu=request.cpu, pinned_cpu=machine.cpu is not None)
    async with guests.template(plan, progress, rebuild=rebuild):
        return shop.templates.called(template_key(plan).digest)


def check_wanted(machine: VmMachine, image: ImageDeclaration) -> None:
    """Raise `UsageError` when the machine has no templates: its file says so, or its disk is somebody else's."""
    if isinstance(image, FileImage):
        raise UsageError(f"its image {machine.image} is a disk file: each of its guests is booted", subject=machine.name)
    if not machine.template:
        raise UsageError("its file says `template: false`", subject=machine.name, hint="each of its guests is booted")


async def template_rows(shop: Workshop) -> list[dict[str, Any]]:
    """All templates, the newest first."""
    found = await trio.to_thread.run_sync(shop.templates.list)
    expected = await expected_facts(shop, {template.facts.get("image") for template in found})
    return [template_row(shop, template, expected) for template in found]


def template_row(shop: Workshop, template: Template, expected: Expected) -> dict[str, Any]:
    return {
        **template.to_json(),
        "in_memory": shop.templates.is_loaded(template.digest),
        "stale": why_stale(template.machine, template.facts, expected),
    }


async def remove_template(shop: Workshop, beginning: str) -> dict[str, Any]:
    """Remove the one whose digest begins so; clones that run are not disturbed.

    Raises:
        NotFoundError, UsageError: none or several do.
        NotAllowedError: it is being made.
    """
    template = shop.templates.called(beginning)
    removed = template.to_json()
    await shop.templates.remove(template.digest)
    return removed


async def collect_templates(shop: Workshop) -> Sequence[str]:
    """Remove those that no declared machine would use now, and those of which nobody made a guest for a month."""
    # Those that are made meanwhile were not looked at; those that are damaged are not in the list.
    known = shop.templates.digests()
    found = await trio.to_thread.run_sync(shop.templates.list)
    expected = await expected_facts(shop, {template.facts.get("image") for template in found})
    now = time.time()
    keep = {
        template.digest
        for template in found
        if not why_stale(template.machine, template.facts, expected) and now - template.used < KEEP_TEMPLATES_S
    }
    return await shop.templates.gc(keep, known)


async def expected_facts(shop: Workshop, images: Iterable[object]) -> dict[str, dict[str, Any]]:
    """What templates of the declared machines with one of `images` must be made of now.

    Machines that cannot be started, because QEMU is gone or a file of the image is, are left out.
    """
    library, wanted = shop.library(), set(images)
    made_from: dict[str, tuple[str, list[int] | None]] = {}
    expected = {}
    for name, machine in library.vms.items():
        qemu = shutil.which(default_qemu(machine))
        if not machine.template or machine.image not in wanted or qemu is None:
            continue
        try:
            if machine.image not in made_from:
                recipe = library.image(machine.image)
                if isinstance(recipe, FileImage):
                    continue
                digest = await shop.images.digest(recipe, library.folders[machine.image])
                image = shop.images.find(digest)
                made_from[machine.image] = digest, image_file(image.boot) if image else None
            digest, file = made_from[machine.image]
            expected[name] = machine_facts(machine, digest, Path(qemu)) | {"image_file": file}
        except (OffloadError, OSError):
            continue
    return expected


def why_stale(machine: str, facts: Mapping[str, Any], expected: Expected) -> str:
    """Why no machine would use the template now; empty when one would.

    Args:
        machine: the one for which it was made.
        facts: what it is made of.
    """
    if any(_fits(facts, wanted) for wanted in expected.values()):
        return ""
    if machine not in expected:
        return "no machine needs it"
    others = [name for name, value in expected[machine].items() if facts.get(name) != value]
    told = next((_DIFFERENCES[name] for name in _DIFFERENCES if name in others), None)
    return told or f"the machine has another {_FIELDS.get(others[0], others[0])} now"


def has_template(machine: VmMachine, image_digest: str, qemu: Path, templates: Iterable[Mapping[str, Any]]) -> bool:
    """Whether builds on the machine find a template, if only for the CPU of some date.

    Args:
        qemu: its binary; a link to it will do.
        templates: what each template is made of.
    """
    if not machine.template or not image_digest:
        return False
    try:
        wanted = machine_facts(machine, image_digest, qemu) | {"disk_slots": DISKS_OF_A_CLONE}
    except (OffloadError, OSError):
        return False
    return any(_fits(facts, wanted) for facts in templates)


def _fits(facts: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(facts.get(name) == value for name, value in wanted.items())
