"""What the API shows of machines, images and builds, as JSON types."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import trio

from offloadd import __version__
from offloadd.daemon.environments import environment_view
from offloadd.daemon.service import Service
from offloadd.daemon.workshop import Workshop
from offloadd.errors import ConfigError, ImageError
from offloadd.image.store import Image
from offloadd.model.childhurd import Childhurd
from offloadd.model.image import FileImage, ImageDeclaration
from offloadd.model.machine import Machine, VmMachine
from offloadd.model.quantity import format_date
from offloadd.plan.argv import InstanceFiles
from offloadd.plan.machine import HURD_CPU
from offloadd.route import MachineFacts
from offloadd.store.database import BuildRow
from offloadd.vm.footprint import private_memory
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


async def machine_rows(service: Service) -> list[dict[str, Any]]:
    """One row for each machine, by name."""
    known = known_machines(service)
    facts = await service.survey.facts(known)
    return [_machine_row(service, machine, facts[name]) for name, machine in known.items()]


async def vm_rows(service: Service) -> list[dict[str, Any]]:
    """The same for virtual machines alone: nobody is waited for.  With each the guests of it that run beside."""
    vms = {name: machine for name, machine in known_machines(service).items() if isinstance(machine, VmMachine)}
    facts = await service.survey.facts(vms, worth=lambda machine: False)
    found = await trio.to_thread.run_sync(read_records, service.workshop.paths.instances)
    private = await trio.to_thread.run_sync(lambda: {record.pid: private_memory(record.pid) for record in found})
    rows = []
    for name, machine in vms.items():
        own = next((record for record in found if record.plan.instance == name), None)
        guests = [record for record in found if record.plan.machine == name and record is not own]
        rows.append(
            {
                **_machine_row(service, machine, facts[name]),
                "private_memory": private[own.pid] if own else None,
                "guests": [_guest_row(record, private[record.pid]) for record in guests],
            }
        )
    return rows


def _guest_row(record: InstanceRecord, private: int | None) -> dict[str, Any]:
    """One guest that is no machine of a user's."""
    plan = record.plan
    return {
        "instance": plan.instance,
        "purpose": record.purpose,
        "pid": record.pid,
        "since": record.began or None,
        "date": format_date(plan.date),
        "cpu": plan.cpu,
        "cpu_count": plan.cpu_count,
        "memory_mib": plan.memory_mib,
        "private_memory": private,
    }


def known_machines(service: Service) -> dict[str, Machine]:
    """Those that are declared, by name; one that runs is as it was when it was started."""
    known: dict[str, Machine] = {**service.workshop.library().machines, **service.machines.declared()}
    return {name: known[name] for name in sorted(known)}


async def machine_row(service: Service, machine: Machine) -> dict[str, Any]:
    """The row of one machine."""
    facts = await service.survey.facts({machine.name: machine})
    return _machine_row(service, machine, facts[machine.name])


def _machine_row(service: Service, machine: Machine, facts: MachineFacts) -> dict[str, Any]:
    """One line of `offload machine list`; what only VMs have is null for others."""
    now = time.time()
    return {
        "name": machine.name,
        "kind": machine.kind,
        "systems": list(facts.systems),
        "missing": dict(facts.missing),
        "mode": facts.mode,
        "fault": facts.fault,
        "remedy": facts.remedy,
        "breaker": {
            "state": facts.breaker.state(now),
            "failures": facts.breaker.failures,
            "open_until": facts.breaker.open_until or None,
        },
        "busy": facts.busy,
        "slots": machine.parallel_builds,
        "speed": machine.speed,
        "emulation": facts.emulation.name.lower(),
        "load": None if facts.load is None else round(facts.load, 2),
        "overload_threshold": machine.overload_threshold,
        "memory_mib": facts.memory_mib,
        "disk_free": facts.disk_free,
        "kernel": facts.kernel,
        "features": list(machine.features),
        "network": machine.network,
        **_vm_fields(service, machine),
    }


_VM_FIELDS = ("state", "since", "reason", "image", "date", "cpu", "cpu_count", "ssh_port")


def _vm_fields(service: Service, machine: Machine) -> dict[str, Any]:
    """What runs, else what is declared (its file may have changed since it was started)."""
    if not isinstance(machine, VmMachine):
        return dict.fromkeys(_VM_FIELDS)
    row = service.workshop.database.machine(machine.name)
    record = _record(service.workshop, machine.name)
    if record is None:
        date = format_date(machine.date) if machine.date else None
        cpu = machine.cpu or (HURD_CPU if isinstance(machine, Childhurd) else None)
        what: tuple[object, ...] = (machine.image, date, cpu, machine.cpu_count, None)
    else:
        plan = record.plan
        what = (plan.boot.image, format_date(plan.date), plan.cpu, plan.cpu_count, record.ssh_port)
    return dict(zip(_VM_FIELDS, (row.state, row.since, row.reason, *what), strict=True))


async def machine_view(service: Service, machine: Machine) -> dict[str, Any]:
    """`offload machine show` and `offload vm show`: the declaration, what is known of it, and what runs."""
    view = {**await machine_row(service, machine), "configuration": machine.to_json()}
    if not isinstance(machine, VmMachine):
        return view
    shop = service.workshop
    record = _record(shop, machine.name)
    running = service.machines.find(machine.name)
    secrets = running.secrets if running else None
    return {
        **view,
        "detail": shop.database.machine(machine.name).detail,
        "instance": await trio.to_thread.run_sync(_instance_view, record) if record else None,
        "console_socket": str(shop.paths.instances / machine.name / "console.sock") if record else None,
        "vnc_socket": _vnc_socket(shop, record) if record else None,
        "console_log": str(shop.paths.instances / machine.name / "console.log") if record else None,
        "logs": str(shop.paths.logs / machine.name),
        "secret_root": str(secrets.root) if secrets else machine.secret_root,
        "client_key": str(secrets.client_key) if secrets else None,
        "host_keys": [path.read_text().strip() for path in secrets.host_keys] if secrets else [],
    }


def _vnc_socket(shop: Workshop, record: InstanceRecord) -> str | None:
    """Where its screen is; None where it has none."""
    return str(InstanceFiles(shop.paths.instances / record.plan.instance).vnc) if record.plan.has_screen else None


def _instance_view(record: InstanceRecord) -> dict[str, Any]:
    plan = record.plan
    guest_clock = record.clock()
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
        "private_memory": private_memory(record.pid),
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
        if isinstance(recipe, FileImage) and not recipe.is_set_up:
            rows.append(_image_row(recipe, "", None, "not set up"))
            continue
        try:
            digest = await shop.images.digest(recipe, library.folders[name])
        except ConfigError:  # a file is gone; whoever boots it is told which
            rows.append(_image_row(recipe, "", None, "incomplete"))
            continue
        current.add(digest)
        try:
            image = shop.images.find(digest)
            rows.append(_image_row(recipe, digest, image, "ready" if image else "not built"))
        except ImageError:  # whoever lists them sees the others all the same
            rows.append(_image_row(recipe, digest, None, "damaged"))
    old = [image for image in shop.images.list() if image.digest not in current]
    return rows + [_image_row(image.recipe, image.digest, image, "superseded") for image in old]


def _image_row(recipe: ImageDeclaration, digest: str, image: Image | None, state: str) -> dict[str, Any]:
    debian = None if isinstance(recipe, FileImage) else recipe
    return {
        "name": recipe.name,
        "kind": recipe.kind,
        "digest": digest,
        "state": state,
        "suite": debian.suite if debian else None,
        "architecture": debian.architecture if debian else None,
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
    if isinstance(recipe, FileImage) and not recipe.is_set_up:
        return {"name": name, "digest": "", "state": "not set up", "recipe": recipe.to_json()}
    digest = await shop.images.digest(recipe, library.folders[name])
    image = shop.images.find(digest)
    if image is None:
        return {"name": name, "digest": digest, "state": "not built", "recipe": recipe.to_json()}
    return {"state": "ready", **image.to_json()}


async def environment_rows(shop: Workshop) -> list[dict[str, Any]]:
    return [environment_view(environment) for environment in shop.environments.list()]


def build_row(row: BuildRow) -> dict[str, Any]:
    """One line of `offload builds`."""
    return {
        "build": row.id,
        "name": row.name,
        "version": row.version,
        "system": row.result.get("system"),
        "machine": row.machine,
        "state": row.state,
        "created": row.created,
        "ended": row.ended,
        "date": row.result.get("date"),
        "duration_s": row.result.get("duration_s"),
    }


def build_view(row: BuildRow) -> dict[str, Any]:
    return {**build_row(row), "request": row.request, "result": row.result}
