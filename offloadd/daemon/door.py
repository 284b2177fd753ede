"""What is behind a door: `GET /v1/offers`, `GET /v1/offers/guix` and `POST /v1/offload`, as in the API, and nothing else.

Builds of an unprivileged guix-daemon run as its own user, so whoever comes in may be hostile.  He can ask for machines: in
small requests, so many at a time, and he is dropped when he is silent.  He is told of those machines alone whose key has been
copied for him, and the copy is what he hears of.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import structlog
import trio
from pydantic import ValidationError

from offloadd.daemon.offers import offers, with_copied_keys
from offloadd.daemon.offload import Verdict
from offloadd.daemon.offload_routes import describe
from offloadd.daemon.service import Service
from offloadd.daemon.small_http import BadRequestError, SmallHttp, SmallRequest
from offloadd.errors import OffloadError
from offloadd.guix.machines import guix_datum
from offloadd.model.door import Door
from offloadd.model.offer import Offer
from offloadd.model.offload import OffloadRequest

MAX_CONNECTIONS = 128
MAX_LEASES = 64
"""More builds at a time than a host's build daemon has under way."""
MAX_ANSWERS = 4
"""At the same time; the others wait: whoever asks much does not keep the daemon from its own work."""
SILENT_S = 5.0
"""Within which a request has come, whole."""
ANSWER_S = 10.0
"""Within which it is answered; a hook waits no longer either."""

_PEER = struct.Struct("3i")  # struct ucred, unix(7): pid, uid, gid

log = structlog.get_logger()


async def serve_door(service: Service, door: Door, listener: socket.socket) -> None:
    """Serve until cancelled; the listener stays the caller's."""
    keeper = _Keeper(service, door)
    # trio closes what it is given.
    with listener.dup() as own:
        await trio.serve_listeners(keeper.receive, [trio.SocketListener(trio.socket.from_stdlib_socket(own))])


class _Keeper:
    def __init__(self, service: Service, door: Door) -> None:
        self._service = service
        self._door = door
        self._connections = 0
        self._leases = 0
        self._turns = trio.CapacityLimiter(MAX_ANSWERS)

    async def receive(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        async with stream:
            uid = _peer(stream)
            if uid not in (0, os.geteuid(), self._door.uid):
                log.warning("another user at the door", socket=str(self._door.socket), uid=uid)
            elif self._connections < MAX_CONNECTIONS:
                self._connections += 1
                try:
                    with trio.CancelScope(deadline=trio.current_time() + SILENT_S) as limit:
                        await self._serve(SmallHttp(stream), limit)
                except (BadRequestError, trio.BrokenResourceError):
                    pass  # he is not told what he did wrong: ours do nothing of the kind
                finally:
                    self._connections -= 1

    async def _serve(self, http: SmallHttp, limit: trio.CancelScope) -> None:
        request = await http.receive()
        limit.deadline = trio.current_time() + ANSWER_S
        self._service.touch()
        answers: dict[tuple[str, str], Callable[[SmallHttp], Awaitable[None]]] = {
            ("GET", "/v1/offers"): self._list,
            ("GET", "/v1/offers/guix"): self._list_running,
            ("POST", "/v1/offload"): partial(self._offload, request, limit),
        }
        answer = answers.get((request.method, request.path))
        if answer is None:
            await http.send(404)
            return
        try:
            await answer(http)
        except (OffloadError, OSError) as exc:
            # It may name files that are not for him.
            log.error("build daemon not answered", socket=str(self._door.socket), error=str(exc))
            await http.send(503)

    async def _list(self, http: SmallHttp) -> None:
        await http.send(200, "application/json", json.dumps([offer.to_json() for offer in await self._offers()]).encode())

    async def _list_running(self, http: SmallHttp) -> None:
        running = [offer for offer in await self._offers() if offer.state == "running"]
        await http.send(200, "text/plain; charset=utf-8", guix_datum(running).encode())

    async def _offers(self) -> list[Offer]:
        async with self._turns:
            found = await offers(self._service.workshop, self._service.machines, self._door.daemon)
            return await trio.to_thread.run_sync(with_copied_keys, found, Path(self._door.keys))

    async def _offload(self, request: SmallRequest, limit: trio.CancelScope, http: SmallHttp) -> None:
        try:
            wanted = OffloadRequest.model_validate_json(request.body)
        except ValidationError:
            wanted = None
        if wanted is None or wanted.daemon != self._door.daemon:
            await http.send(400)
            return
        # Which copies there are is ours to say.
        wanted = wanted.model_copy(update={"keys": {}})
        async with self._turns:
            verdict = await self._service.offloading.decide(wanted, Path(self._door.keys))
        if verdict.take is not None and self._leases >= MAX_LEASES:
            verdict = Verdict(postpone=True, why="too many builds at once")
        said = json.dumps(describe(verdict, wanted)).encode() + b"\n"
        if verdict.take is None:
            await http.send(200, "application/x-ndjson", said)
            return
        with self._lease(verdict.take.machine):
            await http.send(200, "application/x-ndjson", said)
            limit.deadline = float("inf")
            await http.wait_closed()

    @contextmanager
    def _lease(self, machine: str) -> Iterator[None]:
        self._leases += 1
        try:
            with self._service.offloading.lease(machine):
                yield
        finally:
            self._leases -= 1


def _peer(stream: trio.SocketStream) -> int:
    """The user at the other end, when he connected."""
    _, uid, _ = _PEER.unpack(stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(uid)
