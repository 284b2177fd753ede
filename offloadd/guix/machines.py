"""Lists of build machines as Guix has them in machines.scm (Guix manual: "Using the Offload Facility")."""

from __future__ import annotations

from collections.abc import Iterable

from offloadd.guix.scheme import Symbol, Value, comment, write
from offloadd.model.offer import Offer


def render_guix(offers: Iterable[Offer]) -> str:
    """A machines.scm of exactly these machines, in their order: a list, also when it is empty."""
    entries = [_render(offer) for offer in offers]
    return "\n".join([comment("Made by offload: a change is lost."), "(list", *entries]) + ")\n"


def _render(offer: Offer) -> str:
    lines = [f"   ({field} {_quoted(value)})" for field, value in _fields(offer)]
    return "\n".join([f" {comment(offer.machine)}", " (build-machine", *lines]) + ")"


def _fields(offer: Offer) -> list[tuple[str, Value]]:
    """The fields of the record *build-machine*, as data."""
    return [
        ("name", offer.host),
        ("port", offer.port),
        ("systems", offer.systems),
        ("user", offer.user),
        ("host-key", offer.host_key),
        ("private-key", offer.private_key),
        ("parallel-builds", offer.parallel_builds),
        ("speed", offer.speed),
        ("features", offer.features),
        ("overload-threshold", False if offer.overload_threshold is None else offer.overload_threshold),
    ]


def _quoted(value: Value) -> str:
    """As code that has the value."""
    return f"'{write(value)}" if isinstance(value, tuple) else write(value)


def guix_datum(offers: Iterable[Offer]) -> str:
    """The same as data, which is read and not evaluated: a list of lists of (FIELD VALUE); the first field is `machine`."""
    entries = [[[Symbol(field), value] for field, value in [("machine", offer.machine), *_fields(offer)]] for offer in offers]
    return f"{write(entries)}\n"
