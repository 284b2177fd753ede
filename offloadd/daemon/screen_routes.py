"""The part of the HTTP API that is about machines' screens."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response

from offloadd.daemon.service import Service


def add_screen_routes(api: FastAPI, service: Service) -> None:
    """Add them to the application of one service."""

    @api.get("/v1/machines/{name}/screenshot")
    async def screenshot(name: str) -> Response:
        """What the machine's screen shows now, as PNG; also while it boots."""
        instance = service.machines.instance(name)
        return Response(await instance.screenshot(), media_type="image/png")
