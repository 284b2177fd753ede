"""Lists of build machines as Nix has them in /etc/nix/machines and in its setting `builders`.

Eight columns between blanks (Nix Reference Manual: "Remote Builds"): store URI, system types, private key, builds at the same
time, speed, features, mandatory features, public host key in base64.  `-` is "nothing said", `#` begins a comment.  There are
no quotes: what has a blank in it cannot be written.
"""

from __future__ import annotations

import re
from base64 import b64encode
from typing import Literal

from offloadd.errors import UsageError
from offloadd.model.offer import Offer

NixScheme = Literal["ssh-ng", "ssh"]

_PLAIN = re.compile(r"[^\s#;,@\x00-\x1f\x7f-][^\s#;,\x00-\x1f\x7f]*")
"""A word that Nix takes as it is."""


def nix_line(offer: Offer, scheme: NixScheme = "ssh-ng", *, alias: str | None = None, port: bool = True) -> str:
    """The line of one machine, without a newline.

    Args:
        scheme: `ssh` needs a user whom the machine's Nix trusts; old versions of Nix know no other.
        alias: a name of ssh_config for host, port and user, which old versions of Nix cannot have in the URI.
        port: False: ssh is told of it by `render_port`, as the same versions need it.
    Raises:
        UsageError: something that Nix has no way to write.
    """
    where = alias or _address(offer)
    if port and not alias:
        where += f":{offer.port}"
    columns = {
        "address": f"{scheme}://{where}",
        "systems": _words(offer, "systems", offer.systems),
        "private-key": _word(offer, "private-key", offer.private_key),
        "parallel-builds": str(offer.parallel_builds),
        "speed": _number(offer.speed),
        "features": _words(offer, "features", offer.features),
        "mandatory features": "-",
        "host-key": b64encode(offer.host_key.encode()).decode(),
    }
    return " ".join(columns.values())


def _address(offer: Offer) -> str:
    host = f"[{offer.host}]" if ":" in offer.host else offer.host
    return f"{_word(offer, 'user', offer.user)}@{_word(offer, 'host', host)}"


def _words(offer: Offer, field: str, words: tuple[str, ...]) -> str:
    return ",".join(_word(offer, field, word) for word in words) or "-"


def _word(offer: Offer, field: str, word: str) -> str:
    if not _PLAIN.fullmatch(word):
        raise UsageError(f"{field}: Nix's list of machines has no way to write {word!r}", subject=offer.machine)
    return word


def _number(speed: float) -> str:
    """Old versions of Nix know whole numbers only."""
    return str(int(speed)) if speed.is_integer() else repr(speed)


def render_port(offer: Offer) -> str:
    """The part of ssh_config(5) that gives a machine its port when Nix calls it by its own address."""
    host = _word(offer, "host", offer.host)
    # Some versions of Nix leave the brackets of an address of IPv6 to ssh.
    names = f"{host} [{host}]" if ":" in host else host
    return f"Host {names}\n  Port {offer.port}\n"


def render_ssh_config(offer: Offer, alias: str) -> str:
    """The part of ssh_config(5) by which versions of Nix that take no port in a URI find the machine under `alias`.

    Raises:
        UsageError: something that ssh_config has no way to write.
    """
    if not re.fullmatch(r'[^"\n\r]*', offer.private_key):
        raise UsageError(f"ssh_config has no way to write {offer.private_key!r}", subject=offer.machine)
    # Nix gives the host key for the name that it calls; without HostKeyAlias, OpenSSH looks for [HOST]:PORT.
    lines = [
        f"Host {alias}",
        f"  HostName {_word(offer, 'host', offer.host)}",
        f"  Port {offer.port}",
        f"  User {_word(offer, 'user', offer.user)}",
        f"  HostKeyAlias {alias}",
        f'  IdentityFile "{offer.private_key.replace("%", "%%")}"',
        "  IdentitiesOnly yes",
    ]
    return "\n".join(lines) + "\n"
