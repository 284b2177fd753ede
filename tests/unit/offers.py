"""Offers for tests, and strategies that make any."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from offloadd.model.offer import Offer
from offloadd.model.system import SYSTEMS

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGDUWqWvjZ8mn1ruZdXVGbcc3SCRYjO9wqK1TGxHvEB1"

NASTY = ['"', "\\", "\n", '")) (system "rm', "é", "日本", "\U0001f600", " ", ";", "#", "%", "@", "-", "'", ","]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.lists(st.sampled_from(NASTY), min_size=1).map(
    "".join
)
words = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._+/-]{0,30}", fullmatch=True)


def make_offer(**changes: Any) -> Offer:
    values: dict[str, Any] = {
        "machine": "vm",
        "host": "127.0.0.1",
        "port": 11022,
        "user": "offloading",
        "host_key": KEY,
        "private_key": "/secrets/vm/id_ed25519",
        "systems": ("x86_64-linux",),
        "parallel_builds": 1,
        "speed": 1.0,
        "features": (),
        "overload_threshold": 0.8,
        "daemons": ("guix", "nix"),
        "state": "running",
    }
    return Offer(**values | changes)


def any_offers(texts: st.SearchStrategy[str] = texts) -> st.SearchStrategy[Offer]:
    """Offers whose texts are any of these."""
    return st.builds(
        make_offer,
        host=texts,
        port=st.integers(1, 65535),
        user=texts,
        private_key=texts,
        systems=st.lists(st.sampled_from(sorted(SYSTEMS)), min_size=1, max_size=3, unique=True).map(tuple),
        parallel_builds=st.integers(1, 1000),
        speed=st.floats(0.001, 1000),
        features=st.lists(texts, max_size=3, unique=True).map(tuple),
        overload_threshold=st.none() | st.floats(0.001, 1e9),
    )


def without_name(offer: Offer) -> dict[str, Any]:
    """What a list of Guix or Nix keeps of an offer."""
    return offer.model_dump(exclude={"machine", "daemons", "state"})
