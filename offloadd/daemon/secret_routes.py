"""The part of the HTTP API that is about machines' secrets; none ever crosses it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio
from fastapi import FastAPI
from pydantic import BaseModel

from offloadd.daemon.service import Service
from offloadd.errors import NotAllowedError
from offloadd.guest.secret_change import SECRET_KINDS, SecretKind, init_secrets, rotate_secrets, secret_root_of, wanted_kinds
from offloadd.guest.secret_view import describe_secrets
from offloadd.model.machine import VmMachine
from offloadd.paths import Paths
from offloadd.vm.record import read_records


class RotationRequest(BaseModel):
    kinds: tuple[SecretKind, ...] = SECRET_KINDS


def add_secret_routes(api: FastAPI, service: Service) -> None:
    """Add them to the application of one service."""
    shop = service.workshop

    @api.get("/v1/machines/{name}/secrets")
    async def show(name: str) -> dict[str, Any]:
        """Names, modes, dates and fingerprints."""
        machine = shop.library().vm(name)
        return await trio.to_thread.run_sync(lambda: describe_secrets(secret_root_of(machine, shop.paths.secrets)))

    @api.post("/v1/machines/{name}/secrets")
    async def init(name: str) -> dict[str, Any]:
        """Make what is missing; `made` has the names of these files."""
        machine = shop.library().vm(name)

        def work() -> dict[str, Any]:
            before = _paths(describe_secrets(secret_root_of(machine, shop.paths.secrets)))
            view = describe_secrets(init_secrets(machine, shop.paths.secrets))
            return {**view, "made": sorted(_paths(view) - before)}

        return await trio.to_thread.run_sync(work)

    @api.post("/v1/machines/{name}/secrets/rotate")
    async def rotate(name: str, request: RotationRequest) -> dict[str, Any]:
        """Exchange those of these kinds for new ones; the old ones stay in the directory `backup`."""
        machine = shop.library().vm(name)
        _check_at_rest(service, machine)
        # Some milliseconds, and not in a thread: no machine starts in between, with half of them old.
        rotation = rotate_secrets(machine, shop.paths.secrets, request.kinds, datetime.now(UTC))
        view = describe_secrets(secret_root_of(machine, shop.paths.secrets))
        told: dict[str, Any] = {"kinds": rotation.kinds, "takes_guix": "guix" in wanted_kinds(machine)}
        told |= {"backup": str(rotation.backup), "old_signing_key": rotation.old_signing_key}
        return {**view, **told}


def _check_at_rest(service: Service, machine: VmMachine) -> None:
    """Also a guest that a build has for itself was given the secrets that are there now; and two machines may have one root."""
    shop = service.workshop
    running = service.machines.declared()
    known = {**shop.library().vms, **running}

    def shares(name: str) -> bool:
        other = known.get(name)
        return name == machine.name or (other is not None and _root(other, shop.paths) == _root(machine, shop.paths))

    for name in filter(shares, running):
        raise NotAllowedError("runs with these secrets", subject=name, hint=f"offload vm stop {name}")
    for record in read_records(shop.paths.instances):
        if shares(name := record.plan.machine):
            raise NotAllowedError(
                "a build runs with these secrets", subject=name, hint="wait for it, or cancel it: offload builds"
            )


def _root(machine: VmMachine, paths: Paths) -> Path:
    return secret_root_of(machine, paths.secrets).root.resolve()


def _paths(view: dict[str, Any]) -> set[str]:
    return {file["path"] for file in (*view["files"], *view["client"])}
