"""The part of the HTTP API that tells build daemons how to log in to machines, and people what time it is there."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from offloadd.daemon import views
from offloadd.daemon.clocks import clock_rows
from offloadd.daemon.offers import offers
from offloadd.daemon.service import Service
from offloadd.guix.machines import guix_datum
from offloadd.model.machine import BuildDaemon


def add_offer_routes(api: FastAPI, service: Service) -> None:
    """Add them to the application of one service."""

    @api.get("/v1/offers")
    async def all_offers(daemon: BuildDaemon | None = None) -> list[dict[str, Any]]:
        """The machines that take builds of guix-daemon or nix-daemon, of any or of that one, running or not."""
        service.workshop.library()  # people are told of a file that is wrong
        return [offer.to_json() for offer in await offers(service.workshop, service.machines, daemon)]

    @api.get("/v1/offers/guix")
    async def guix_offers() -> PlainTextResponse:
        """Those of them that run and take Guix's, as the datum that a live machines.scm reads."""
        found = await offers(service.workshop, service.machines, "guix")
        return PlainTextResponse(guix_datum([offer for offer in found if offer.state == "running"]))

    @api.get("/v1/clocks")
    async def clocks() -> list[dict[str, Any]]:
        """What each machine's clock shows, and what it should."""
        return await clock_rows(service, views.known_machines(service))
