"""Machines for the builds of guix-daemon and nix-daemon: which one, started when it is needed, stopped when it is not.

A build's hook asks, and holds a lease for as long as its connection is open.  A machine that was started for that, and not by
its user, is stopped when it had no lease for its `idle-timeout`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from offloadd.daemon.machines import Machines, RunningMachine
from offloadd.daemon.noted import noted
from offloadd.daemon.offers import offers, with_copied_keys
from offloadd.daemon.slots import Slots
from offloadd.daemon.workshop import Workshop
from offloadd.errors import CancelledError, NotFoundError, OffloadError
from offloadd.model.offer import Offer
from offloadd.model.offload import OffloadRequest
from offloadd.nursery import open_narrow_nursery

DEFAULT_IDLE_S = 600.0
"""For a machine that was adopted while its file is wrong."""

ASKED_AGAIN_S = 15.0
"""A machine that was started is left for this long at least: guix-daemon asks again only every 5 s."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of a request."""

    take: Offer | None = None
    """Accepted: this one."""
    start: Offer | None = None
    """Postponed, and this one is to be started."""
    postpone: bool = False
    why: str = ""


def judge(
    request: OffloadRequest, offered: Iterable[Offer], busy: Callable[[str], int], broken: Collection[str] = ()
) -> Verdict:
    """Decide about a request.

    Args:
        offered: all machines for build daemons.
        busy: the slots of a machine that are taken.
        broken: machines that lately did not start.
    """
    fit = sorted((offer for offer in offered if _fits(offer, request)), key=lambda offer: offer.machine)
    # One that runs after all, as its user has mended and started it, is as good as any.
    usable = [offer for offer in fit if offer.state == "running" or offer.machine not in broken]
    if not usable:
        what = "does not start" if fit else f"builds {request.system} for {request.daemon}"
        return Verdict(why=f"{', '.join(offer.machine for offer in fit) or 'no machine'} {what}{_with(request.features)}")
    free = [offer for offer in usable if offer.state == "running" and busy(offer.machine) < offer.parallel_builds]
    if free:
        # The fastest; of equals the one with fewer builds, and always the same one for the same question.
        return Verdict(
            take=min(free, key=lambda offer: (-offer.speed, busy(offer.machine) / offer.parallel_builds, offer.machine))
        )
    starting = [offer for offer in usable if offer.state == "starting"]
    if starting:
        return Verdict(postpone=True, why=f"{starting[0].machine} is starting")
    stopped = [offer for offer in usable if offer.state == "stopped"]
    if stopped:
        chosen = min(stopped, key=lambda offer: (-offer.speed, offer.machine))
        return Verdict(start=chosen, postpone=True, why=f"{chosen.machine} is started")
    # Each build daemon's own habit: Nix builds here when all are busy, Guix waits for a machine that fits.
    waits = request.daemon == "guix" or not request.local
    return Verdict(postpone=waits, why=f"{', '.join(offer.machine for offer in usable)}: no free slot")


def _fits(offer: Offer, request: OffloadRequest) -> bool:
    return request.daemon in offer.daemons and request.system in offer.systems and set(request.features) <= set(offer.features)


def _with(features: tuple[str, ...]) -> str:
    return f" with {', '.join(features)}" if features else ""


class Offloading:
    """Who has leases, and which machines run for that.

    Args:
        nursery: owns the tasks that mind machines.
    """

    def __init__(self, workshop: Workshop, machines: Machines, slots: Slots, nursery: trio.Nursery) -> None:
        self._workshop = workshop
        self._machines = machines
        self._slots = slots
        self._nursery = nursery
        self._marks = workshop.paths.state / "on-demand"
        """A file for each machine that runs for a build daemon, which tells the next daemon of ours."""
        self._leases: dict[str, int] = {}
        self._minded: dict[str, _Minded] = {}

    def __len__(self) -> int:
        """Leases."""
        return sum(self._leases.values())

    async def decide(self, request: OffloadRequest, copies: Path | None = None) -> Verdict:
        """What becomes of the request; a machine that it needs is started in the background.

        An offer that is taken is to be leased before anything else is waited for.

        Args:
            copies: a folder with copies of client keys, for who can read only these: the other machines are not for him.
        Raises:
            ConfigError: a machine's file is wrong.
        """
        offered = await offers(self._workshop, self._machines, request.daemon)
        if copies is not None:
            offered = await trio.to_thread.run_sync(with_copied_keys, offered, copies)
        verdict = judge(request, offered, self._slots.busy, {offer.machine for offer in offered if self._broken(offer.machine)})
        if verdict.start is not None:
            self._start(verdict.start.machine)
        if verdict.take is not None and (minded := self._minded.get(verdict.take.machine)) and minded.is_ending:
            return Verdict(postpone=True, why=f"{verdict.take.machine} has just been stopped")
        return verdict

    @contextmanager
    def lease(self, machine: str) -> Iterator[None]:
        """Hold a slot of the machine, which runs on for as long."""
        self._leases[machine] = self._leases.get(machine, 0) + 1
        try:
            with self._slots.take(machine):
                yield
        finally:
            self._leases[machine] -= 1
            if not self._leases[machine]:
                del self._leases[machine]
            self._touch(machine)

    def leave_to_user(self, machine: str) -> None:
        """Its user has started it, too: it is his to stop."""
        minded = self._minded.get(machine)
        if minded is not None and not minded.is_ending:  # one that is being stopped is started anew after that
            del self._minded[machine]
            minded.scope.cancel()
        with noted(machine):
            self._mark(machine).unlink(missing_ok=True)

    def resume(self) -> None:
        """Go on minding what an earlier daemon had started and this one has adopted."""
        for mark in self._marks.glob("*"):
            if mark.name in self._machines.names():
                self._mind(mark.name)
            else:
                mark.unlink(missing_ok=True)

    def _start(self, name: str) -> None:
        with noted(name):
            self._marks.mkdir(mode=0o700, exist_ok=True)
            self._mark(name).touch()
        log.info("machine wanted by a build daemon", machine=name)
        self._mind(name)

    def _mind(self, name: str) -> None:
        if name not in self._minded:
            minded = self._minded[name] = _Minded()
            self._nursery.start_soon(self._mind_until_end, name, minded)

    async def _mind_until_end(self, name: str, minded: _Minded) -> None:
        with minded.scope:
            try:
                running = await self._machines.start(name)
                self._note_success(name)
                await self._wait_idle(name, running, minded)
            except CancelledError:
                pass  # its user has stopped it
            except OffloadError as exc:
                self._note_failure(name, exc)
        if self._minded.get(name) is minded:
            del self._minded[name]
            with noted(name):
                self._mark(name).unlink(missing_ok=True)

    async def _wait_idle(self, name: str, running: RunningMachine, minded: _Minded) -> None:
        """Stop it when nobody had a lease for long enough; returns at its end, whatever the way."""
        timeout = running.declared.idle_timeout if running.declared else DEFAULT_IDLE_S
        minded.last_used = trio.current_time() + max(0.0, ASKED_AGAIN_S - timeout)
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(_then_cancel, running.ended.wait, nursery.cancel_scope)
            while (rest := self._rest(name, minded, timeout)) > 0:
                with trio.move_on_after(rest):
                    await minded.unused.wait()
            minded.is_ending = True
            log.info("machine idle: stopping it", machine=name)
            with suppress(NotFoundError):  # it has just ended by itself
                await self._machines.stop(name)
            nursery.cancel_scope.cancel()

    def _rest(self, name: str, minded: _Minded, timeout: float) -> float:
        """Seconds that it has left if nobody comes."""
        return float("inf") if name in self._leases else minded.last_used + timeout - trio.current_time()

    def _touch(self, name: str) -> None:
        """A lease has ended."""
        if name in self._minded:
            minded = self._minded[name]
            minded.last_used = trio.current_time()
            minded.unused.set()
            minded.unused = trio.Event()

    def _broken(self, name: str) -> bool:
        """A machine that does not come up is left alone for a while, longer each time: else no build would ever go on."""
        return self._workshop.database.breaker(name).state(time.time()) == "open"

    def _note_success(self, name: str) -> None:
        database = self._workshop.database
        with noted(name):
            if (breaker := database.breaker(name)).failures:
                database.store_breaker(name, breaker.after_success())

    def _note_failure(self, name: str, error: OffloadError) -> None:
        log.error("machine not started for a build daemon", machine=name, error=str(error))
        database = self._workshop.database
        with noted(name):
            database.store_breaker(name, database.breaker(name).after_failure(time.time()))

    def _mark(self, name: str) -> Path:
        return self._marks / name


class _Minded:
    """A machine that was started for a build daemon."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.last_used = trio.current_time()
        self.unused = trio.Event()
        """A lease has ended."""
        self.is_ending = False
        """It was idle for too long: nobody gets it any more."""


async def _then_cancel(wait: Callable[[], Awaitable[object]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()
