"""The HTTP API.

What takes long answers with JSON lines: {"event": "phase", ...}*, then {"event": "done", ...} or {"event": "error", ...}.

FastAPI is used in this folder alone; its description of the API is at /openapi.json.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import trio
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from offloadd import __version__
from offloadd.config.requests import make_requests
from offloadd.daemon import views
from offloadd.daemon.doors import Doors
from offloadd.daemon.environments import environment_view, find_recipe, make_environment, remove_environment, unpack_environment
from offloadd.daemon.offer_routes import add_offer_routes
from offloadd.daemon.offload_routes import add_offload_routes
from offloadd.daemon.own_fault import own_fault
from offloadd.daemon.screen_routes import add_screen_routes
from offloadd.daemon.secret_routes import add_secret_routes
from offloadd.daemon.service import Service
from offloadd.daemon.templates import check_wanted, make_template, remove_template, template_rows
from offloadd.daemon.trial import Trial
from offloadd.errors import (
    ConfigError,
    NoMachineError,
    NotAllowedError,
    NotFoundError,
    OffloadError,
    UsageError,
)
from offloadd.model.asked import Asked
from offloadd.model.environment import EnvironmentRequest
from offloadd.model.machine import Machine
from offloadd.model.recipe import BuildRequest
from offloadd.model.state import MachineMode
from offloadd.model.template import TemplateRequest
from offloadd.process import Progress, host_error

_HTTP_STATUS: dict[type[OffloadError], int] = {
    UsageError: 400,
    NotAllowedError: 403,
    NotFoundError: 404,
    NoMachineError: 409,
    ConfigError: 422,
}
JSON_LINES = "application/x-ndjson"

Work = Callable[[Progress], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], None]


def make_api(service: Service, doors: Doors) -> FastAPI:
    """The application for one service."""
    api = FastAPI(title="offload", version=__version__, docs_url=None, redoc_url=None)
    _add_errors(api, service)
    _add_activity(api, service)
    _add_daemon(api, service)
    _add_machines(api, service)
    _add_modes(api, service)
    add_offer_routes(api, service)
    add_offload_routes(api, service)
    add_secret_routes(api, service)
    add_screen_routes(api, service)
    _add_doors(api, doors)
    _add_images(api, service)
    _add_environments(api, service)
    _add_templates(api, service)
    _add_builds(api, service)
    _add_quirks(api, service)
    return api


def _add_errors(api: FastAPI, service: Service) -> None:
    @api.exception_handler(OffloadError)
    async def ours(_: Request, exc: OffloadError) -> JSONResponse:
        status = next((code for kind, code in _HTTP_STATUS.items() if isinstance(exc, kind)), 503)
        return JSONResponse(exc.to_json(), status_code=status)

    @api.exception_handler(OSError)
    async def the_hosts(_: Request, exc: OSError) -> JSONResponse:
        return JSONResponse(host_error(exc, "offloadd", service.workshop.paths.state).to_json(), status_code=503)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, exc: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
        return JSONResponse(UsageError(f"the request is wrong: {problems}").to_json(), status_code=400)

    @api.exception_handler(HTTPException)
    async def no_such_path(request: Request, exc: HTTPException) -> JSONResponse:
        error = UsageError(f"{request.method} {request.url.path}: {exc.detail}", subject="offloadd")
        return JSONResponse(error.to_json(), status_code=exc.status_code)


def _add_activity(api: FastAPI, service: Service) -> None:
    @api.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Any:
        service.touch()
        return await call_next(request)


def _add_daemon(api: FastAPI, service: Service) -> None:
    @api.get("/v1/status")
    async def status() -> dict[str, Any]:
        return views.status_view(service)

    @api.post("/v1/stop")
    async def stop() -> dict[str, Any]:
        """Stop the daemon, its builds and its machines."""
        service.stop()
        return {"pid": service.pid}


def _add_doors(api: FastAPI, doors: Doors) -> None:
    @api.post("/v1/doors")
    async def refresh() -> list[dict[str, Any]]:
        """Read anew which sockets there are to be for build daemons that run as users of their own; these."""
        return [door.to_json() for door in await doors.refresh()]


def _add_machines(api: FastAPI, service: Service) -> None:
    def find(name: str) -> Machine:
        """One that runs is as it was when it was started, until its file is read again."""
        library = service.workshop.library()
        undeclared = None if name in library.machines else service.machines.declared().get(name)
        return undeclared or library.machine(name)

    @api.get("/v1/machines")
    async def machines(vms: bool = False) -> list[dict[str, Any]]:
        """All machines; or only virtual ones, with the guests of each and the memory that they take."""
        return await (views.vm_rows(service) if vms else views.machine_rows(service))

    @api.get("/v1/machines/{name}")
    async def machine(name: str) -> dict[str, Any]:
        return await views.machine_view(service, find(name))

    @api.post("/v1/machines/{name}/start")
    async def start(name: str) -> StreamingResponse:
        own = service.workshop.library().vm(name).name

        async def work(progress: Progress) -> dict[str, Any]:
            service.offloading.leave_to_user(own)
            await service.machines.start(own, progress)
            return await views.machine_view(service, service.workshop.library().vm(own))

        service.survey.check_online(own)
        return _stream(service, work)

    @api.post("/v1/machines/{name}/stop")
    async def stop(name: str) -> dict[str, Any]:
        declared = service.machines.declared().get(name)
        await service.machines.stop(name)
        return await views.machine_row(service, declared or service.workshop.library().vm(name))

    @api.post("/v1/machines/{name}/test")
    async def test(name: str) -> StreamingResponse:
        """Try the machine for real: {"event": "check", ...}* among the phases."""
        machine = service.workshop.library().machine(name)
        service.survey.check_online(machine.name)

        async def work(send: Send) -> dict[str, Any]:
            trial = Trial(
                machine,
                service.workshop,
                service.guests,
                _progress(send),
                lambda check: send({"event": "check", **check.to_json()}),
            )
            await trial.run()
            return {"machine": name, "ok": trial.ok, "checks": [check.to_json() for check in trial.checks]}

        return _stream_events(service, work)


def _add_modes(api: FastAPI, service: Service) -> None:
    @api.post("/v1/machines/{name}/drain")
    async def drain(name: str) -> dict[str, Any]:
        """It finishes what it has and takes nothing new."""
        return await set_mode(name, MachineMode.DRAINED)

    @api.post("/v1/machines/{name}/resume")
    async def resume(name: str) -> dict[str, Any]:
        """It takes builds again; what it failed before is forgotten."""
        return await set_mode(name, MachineMode.ONLINE)

    @api.post("/v1/machines/{name}/offline")
    async def offline(name: str) -> dict[str, Any]:
        """It is not even talked to."""
        return await set_mode(name, MachineMode.OFFLINE)

    async def set_mode(name: str, mode: MachineMode) -> dict[str, Any]:
        machine = service.workshop.library().machine(name)
        service.survey.set_mode(machine.name, mode)
        return await views.machine_row(service, machine)


def _add_images(api: FastAPI, service: Service) -> None:
    shop = service.workshop

    @api.get("/v1/images")
    async def images() -> list[dict[str, Any]]:
        return await views.image_rows(shop)

    @api.get("/v1/images/{name}")
    async def image(name: str) -> dict[str, Any]:
        return await views.image_view(shop, name)

    @api.post("/v1/images/{name}/build")
    async def build(name: str, rebuild: bool = False) -> StreamingResponse:
        library = shop.library()
        library.image(name)

        async def work(progress: Progress) -> dict[str, Any]:
            return (await service.build_image(library, name, progress, rebuild=rebuild)).to_json()

        return _stream(service, work)

    @api.delete("/v1/images/{name}")
    async def remove(name: str) -> list[str]:
        await service.release_image(name)
        return [image.digest for image in await shop.images.remove(name)]

    @api.post("/v1/images/gc")
    async def gc() -> dict[str, Sequence[str]]:
        """Remove images that no recipe describes any more and no instance uses, environments and templates that no build used
        lately, and templates that no machine would use now."""
        return await service.collect_garbage()


def _add_environments(api: FastAPI, service: Service) -> None:
    shop = service.workshop

    @api.get("/v1/environments")
    async def environments() -> list[dict[str, Any]]:
        return await views.environment_rows(shop)

    @api.post("/v1/environments/build")
    async def build(request: EnvironmentRequest, rebuild: bool = False) -> StreamingResponse:
        async def work(progress: Progress) -> dict[str, Any]:
            return environment_view(await make_environment(shop, request, progress, rebuild=rebuild))

        find_recipe(shop, request)
        return _stream(service, work)

    @api.post("/v1/environments/unpack")
    async def unpack(request: EnvironmentRequest) -> StreamingResponse:
        """As `build`, and unpacked on this host: `root` is its directory."""

        async def work(progress: Progress) -> dict[str, Any]:
            return await unpack_environment(shop, request, progress)

        find_recipe(shop, request)
        return _stream(service, work)

    @api.delete("/v1/environments/{digest}")
    async def remove(digest: str) -> dict[str, Any]:
        """Remove the one whose digest begins so."""
        return environment_view(await remove_environment(shop, digest))

    @api.post("/v1/environments/gc")
    async def gc() -> list[str]:
        """Remove those that no build used lately."""
        return list(await service.collect_environments())


def _add_templates(api: FastAPI, service: Service) -> None:
    shop = service.workshop

    @api.get("/v1/templates")
    async def templates() -> list[dict[str, Any]]:
        return await template_rows(shop)

    @api.post("/v1/templates/build")
    async def build(request: TemplateRequest, rebuild: bool = False) -> StreamingResponse:
        async def work(progress: Progress) -> dict[str, Any]:
            template = await make_template(service.guests, request, progress, rebuild=rebuild)
            if rebuild:
                await service.pool.forget(templates={template.digest})
            return template.to_json()

        library = shop.library()
        machine = library.vm(request.machine)
        check_wanted(machine, library.image(machine.image))
        service.survey.check_online(request.machine)
        return _stream(service, work)

    @api.delete("/v1/templates/{digest}")
    async def remove(digest: str) -> dict[str, Any]:
        """Remove the one whose digest begins so."""
        removed = await remove_template(shop, digest)
        await service.pool.forget(templates={removed["digest"]})
        return removed

    @api.post("/v1/templates/gc")
    async def gc() -> list[str]:
        """Remove those that no machine would use now, and those that nobody used lately."""
        return await service.collect_templates()


def _add_builds(api: FastAPI, service: Service) -> None:
    @api.post("/v1/requests")
    async def requests(asked: Asked) -> list[dict[str, Any]]:
        """What a command line asks for as requests that can be built or routed.  A recipe may take seconds to read."""
        return [request.to_json() for request in await trio.to_thread.run_sync(make_requests, asked)]

    @api.post("/v1/builds", status_code=201)
    async def create(request: BuildRequest) -> dict[str, str]:
        return {"build": await service.builds.create(request)}

    @api.post("/v1/route")
    async def route(request: BuildRequest) -> dict[str, Any]:
        """Which machine would take the build, and why no other."""
        return (await service.builds.decide(request)).to_json()

    @api.put("/v1/builds/{build}/source", status_code=202)
    async def source(build: str, request: Request) -> dict[str, str]:
        await service.builds.take_source(build, request.stream())
        return {"build": build}

    @api.get("/v1/builds")
    async def builds(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> list[dict[str, Any]]:
        return [views.build_row(row) for row in service.workshop.database.builds(limit=limit)]

    @api.get("/v1/builds/{build}")
    async def build(build: str) -> dict[str, Any]:
        return views.build_view(service.workshop.database.build(build))

    @api.get("/v1/builds/{build}/events")
    async def events(build: str) -> StreamingResponse:
        return StreamingResponse(service.builds.events(build), media_type=JSON_LINES)

    @api.get("/v1/builds/{build}/outputs")
    async def outputs(build: str) -> FileResponse:
        """The outputs as a tar."""
        return FileResponse(service.builds.outputs(build), media_type="application/x-tar")

    @api.post("/v1/builds/{build}/cancel")
    async def cancel(build: str) -> dict[str, Any]:
        await service.builds.cancel(build)
        return views.build_row(service.workshop.database.build(build))


def _add_quirks(api: FastAPI, service: Service) -> None:
    database = service.workshop.database

    @api.get("/v1/quirks")
    async def quirks() -> list[dict[str, Any]]:
        """What does not build under qemu-user."""
        return [asdict(quirk) for quirk in database.quirks()]

    @api.delete("/v1/quirks")
    async def forget(name: str | None = None, system: str | None = None) -> dict[str, int]:
        """Forget those of one package, of one system type, or all."""
        found = [quirk for quirk in database.quirks() if name in (None, quirk.name) and system in (None, quirk.system)]
        if name is not None and not found:
            raise NotFoundError(f"nothing is remembered of it{f' for {system}' if system else ''}", subject=name)
        return {"forgotten": sum(database.forget_quirks(quirk.name, quirk.system) for quirk in found)}


def _stream(service: Service, work: Work) -> StreamingResponse:
    """Run `work` beside the response, which is its phases and what it gives; a client that goes away cancels it."""
    return _stream_events(service, lambda send: work(_progress(send)))


def _progress(send: Send) -> Progress:
    return lambda text, fraction: send({"event": "phase", "text": text, "fraction": fraction})


def _stream_events(service: Service, work: Callable[[Send], Awaitable[dict[str, Any]]]) -> StreamingResponse:
    """The same for work that has other events to tell."""
    outlet, inlet = trio.open_memory_channel[dict[str, Any]](100)
    scope = trio.CancelScope()

    def send(event: dict[str, Any]) -> None:
        with suppress(trio.WouldBlock, trio.BrokenResourceError):  # a reader that is slow misses progress, nothing else
            outlet.send_nowait(event)

    async def run() -> None:
        with scope, outlet:
            try:
                done = {"event": "done", **await work(send)}
            except OffloadError as exc:
                done = {"event": "error", **exc.to_json()}
            except OSError as exc:
                done = {"event": "error", **host_error(exc, "offloadd", service.workshop.paths.cache).to_json()}
            except Exception as exc:
                # It must not take the builds and the machines along.
                done = {"event": "error", **own_fault(exc, "offloadd").to_json()}
            with suppress(trio.BrokenResourceError):  # nobody listens any more
                await outlet.send(done)

    async def lines() -> AsyncIterator[bytes]:
        service.nursery.start_soon(run)
        try:
            with inlet:
                async for event in inlet:
                    yield json.dumps(event).encode() + b"\n"
        finally:
            scope.cancel()

    return StreamingResponse(lines(), media_type=JSON_LINES)
