"""The part of the HTTP API that build hooks ask."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import trio
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from offloadd.daemon.offload import Verdict
from offloadd.daemon.service import Service
from offloadd.errors import OffloadError
from offloadd.guix.machines import render_guix
from offloadd.model.offer import Offer
from offloadd.model.offload import OffloadRequest
from offloadd.nix.machines import nix_line, render_port


def add_offload_routes(api: FastAPI, service: Service) -> None:
    """Add them to the application of one service."""

    @api.post("/v1/offload")
    async def offload(request: OffloadRequest) -> StreamingResponse:
        """A machine for one derivation: {"decision": "accept", "offer": ..., "entry": ...}, or another decision and "why".

        After "accept" the answer stays open: the machine is the client's until it closes the connection.  `entry` is the offer
        as the build daemon's own program reads it, and `ssh_config`, for Nix, what ssh has to know besides.
        """
        return StreamingResponse(_lines(service, request), media_type="application/x-ndjson")


async def _lines(service: Service, request: OffloadRequest) -> AsyncIterator[bytes]:
    """Decided here and not before the response begins: a client that has gone by then leaves no lease behind."""
    try:
        verdict = await service.offloading.decide(request)
        said = describe(verdict, request)
    except OffloadError as exc:
        verdict, said = Verdict(), {"decision": "decline", "why": str(exc)}
    with service.offloading.lease(verdict.take.machine) if verdict.take else nullcontext():
        yield json.dumps(said).encode() + b"\n"
        if verdict.take:
            await trio.sleep_forever()


def describe(verdict: Verdict, request: OffloadRequest) -> dict[str, Any]:
    """The first line of the answer."""
    if verdict.take is None:
        return {"decision": "postpone" if verdict.postpone else "decline", "why": verdict.why}
    offer = verdict.take
    if (key := request.keys.get(offer.machine)) is not None:
        offer = offer.model_copy(update={"private_key": key})
    return {"decision": "accept", "offer": offer.to_json(), **_entry(offer, request)}


def _entry(offer: Offer, request: OffloadRequest) -> dict[str, str]:
    if request.daemon == "guix":
        return {"entry": render_guix([offer])}
    return {"entry": nix_line(offer, port=False), "ssh_config": render_port(offer)}
