"""What the API shows of machines, images and builds, as JSON types."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from offloadd import __version__
from offloadd.daemon.service import Service
from offloadd.daemon.workshop import Workshop
from offloadd.errors import ImageError
from offloadd.image.store import Image
from offloadd.model.image import ImageRecipe
from offloadd.model.machine import SSH_PORT, Machine
from offloadd.model.quantity import format_date
from offloadd.store.database import BuildRow
from offloadd.vm.record import InstanceRecord, read_records


def status_view(service: Service) -> dict[str, Any]:
    paths = service.workshop.paths
    return {
        "version": __version__,
        "pid": service.pid,
        "started": service.started,
        "idle_timeout_s": service.idle_timeout_s,
        "machines": len(service.machines),
        "builds": len(service.builds),
        "socket": str(paths.socket),
        "state": str(paths.state),
        "cache": str(paths.cache),
        "log": str(paths.daemon_log),
    }


def machine_row(service: Service, machine: Machine) -> dict[str, Any]:
    """One line of `offload vm list`: what runs, else what is declared (its file may have changed since it was started)."""
    row = service.workshop.database.machine(machine.name)
    record = _record(service.workshop, machine.name)
    plan = record.plan if record else None
    return {
        "name": machine.name,
        "kind": machine.kind,
        "state": row.state,
        "since": row.since,
        "reason": row.reason,
        "systems": list(machine.systems),
        "image": plan.boot.image if plan else machine.image,
        "date": format_date(plan.date if plan else machine.date),
        "cpu": plan.cpu if plan else machine.cpu,
        "cpu_count": plan.cpu_count if plan else machine.cpu_count,
        "memory_mib": plan.memory_mib if plan else machine.memory_size,
        "ssh_port": record.ports.get(SSH_PORT) if record else None,
    }


def machine_view(service: Service, machine: Machine) -> dict[str, Any]:
    """`offload vm show`: the declaration, the state, and what runs."""
    shop = service.workshop
    row = shop.database.machine(machine.name)
    record = _record(shop, machine.name)
    running = service.machines.find(machine.name)
    secrets = running.secrets if running else None
    return {
        **machine_row(service, machine),
        "detail": row.detail,
        "configuration": machine.to_json(),
        "instance": _instance_view(record) if record else None,
        "console_socket": str(shop.paths.instances / machine.name / "console.sock") if record else None,
        "console_log": str(shop.paths.instances / machine.name / "console.log") if record else None,
        "logs": str(shop.paths.logs / machine.name),
        "secret_root": str(secrets.root) if secrets else machine.secret_root,
        "client_key": str(secrets.client_key) if secrets else None,
        "host_keys": [path.read_text().strip() for path in secrets.host_keys] if secrets else [],
    }


def _instance_view(record: InstanceRecord) -> dict[str, Any]:
    plan = record.plan
    guest_clock = plan.date.timestamp() + time.time() - record.began
    return {
        "pid": record.pid,
        "began": record.began,
        "accelerator": plan.qemu.accelerator,
        "qemu": plan.qemu.binary,
        "qemu_version": plan.qemu.version,
        "cpu": plan.cpu,
        "missing_cpu_features": list(record.missing_features),
        "clock": format_date(datetime.fromtimestamp(guest_clock, UTC)),
        "cores": list(record.cores),
        "ports": {str(guest): host for guest, host in record.ports.items()},
        "image_digest": plan.boot.digest,
    }


def _record(shop: Workshop, name: str) -> InstanceRecord | None:
    return next((record for record in read_records(shop.paths.instances) if record.plan.instance == name), None)


async def image_rows(shop: Workshop) -> list[dict[str, Any]]:
    """Each recipe with its image, and images that no recipe describes any more."""
    library = shop.library()
    rows: list[dict[str, Any]] = []
    current: set[str] = set()
    for name, recipe in sorted(library.images.items()):
        digest = await shop.images.digest(recipe, library.folders[name])
        current.add(digest)
        try:
            image = shop.images.find(digest)
            rows.append(_image_row(recipe, digest, image, "ready" if image else "not built"))
        except ImageError:  # whoever lists them sees the others all the same
            rows.append(_image_row(recipe, digest, None, "damaged"))
    old = [image for image in shop.images.list() if image.digest not in current]
    return rows + [_image_row(image.recipe, image.digest, image, "superseded") for image in old]


def _image_row(recipe: ImageRecipe, digest: str, image: Image | None, state: str) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "digest": digest,
        "state": state,
        "suite": recipe.suite,
        "architecture": recipe.architecture,
        "made": image.made if image else None,
        "size_on_disk": image.size_on_disk() if image else None,
        "kernel_version": image.kernel_version if image else None,
    }


async def image_view(shop: Workshop, name: str) -> dict[str, Any]:
    """The recipe's image when there is such a recipe, else the newest image of that name or digest."""
    library = shop.library()
    if name not in library.images:
        return {"state": "superseded", **shop.images.show(name).to_json()}
    recipe = library.images[name]
    digest = await shop.images.digest(recipe, library.folders[name])
    image = shop.images.find(digest)
    if image is None:
        return {"name": name, "digest": digest, "state": "not built", "recipe": recipe.to_json()}
    return {"state": "ready", **image.to_json()}


async def environment_rows(shop: Workshop) -> list[dict[str, Any]]:
    return [environment.to_json() for environment in shop.environments.list()]


def build_row(row: BuildRow) -> dict[str, Any]:
    """One line of `offload builds`."""
    return {
        "build": row.id,
        "name": row.name,
        "version": row.version,
        "machine": row.machine,
        "state": row.state,
        "created": row.created,
        "ended": row.ended,
        "date": row.result.get("date"),
        "duration_s": row.result.get("duration_s"),
    }


def build_view(row: BuildRow) -> dict[str, Any]:
    return {**build_row(row), "request": row.request, "result": row.result}
