"""Guix's signing keys: who signed the store items that come from another machine.

They are ECDSA keys on the curve Ed25519 (not EdDSA): the point q is compressed as in RFC 8032, and the scalar d is written
big-endian, as `guix archive --generate-key` gets them from libgcrypt: "(genkey (ecdsa (curve Ed25519) (flags rfc6979)))".
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offloadd.errors import UsageError
from offloadd.guix.files import Owner, locked, make_directory, publish_new, read_small, wrong
from offloadd.guix.sexp import MAX_SIZE, Sexp, advanced, canonical, parse_sexp

PUBLIC_KEY = "signing-key.pub"
PRIVATE_KEY = "signing-key.sec"
PUBLIC_MODE = 0o444
PRIVATE_MODE = 0o400

_CURVE = b"Ed25519"
_POINT = re.compile(rb"\x40?.{32}", re.DOTALL)
"""libgcrypt also takes it after a byte 0x40."""
_PUBLIC_PARTS = {b"ecc": (b"curve", b"flags", b"q"), b"rsa": (b"n", b"e")}
"""What of a private key is public.  An RSA key's q is not."""


@dataclass(frozen=True)
class PublicKey:
    """A public key.  Two are equal when Guix takes them for one: when their expressions are."""

    sexp: tuple[Sexp, ...]
    """`(public-key (ALGORITHM (NAME VALUE) ...))`"""
    algorithm: str = field(compare=False)
    """For example `ecc`."""
    parameters: Mapping[bytes, bytes] = field(compare=False)
    """For example `curve` and `q`."""

    @property
    def kind(self) -> str:
        """The curve, or the algorithm of a key without one."""
        return _as_text(self.parameters[b"curve"]) if b"curve" in self.parameters else self.algorithm

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the point q; of the canonical form where the key is no point."""
        point = self.parameters.get(b"q") if b"curve" in self.parameters else None
        return hashlib.sha256(point or canonical(self.sexp)).hexdigest()

    @property
    def text(self) -> bytes:
        """As it stands in a `.pub` file."""
        return advanced(self.sexp)


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """A signing key in its directory; holds no secret itself."""

    directory: Path
    public: PublicKey
    made: tuple[Path, ...] = ()
    """Which of its files were not there before."""


def as_public_key(sexp: Sexp) -> PublicKey | None:
    """None when it has not the form of one."""
    match sexp:
        case (b"public-key", (bytes(algorithm), *pairs)):
            parameters = _parameters(pairs)
            if parameters:
                return PublicKey((b"public-key", (algorithm, *pairs)), _as_text(algorithm), parameters)
    return None


def parse_public_key(data: bytes, file: str) -> PublicKey:
    """Read a public key in any form that Guix takes.

    Args:
        file: its name, for the error.

    Raises:
        ConfigError: it is none.
    """
    sexp = parse_sexp(data, file)
    key = as_public_key(sexp)
    if key is None:
        if sexp[:1] == (b"private-key",):
            raise wrong(Path(file), "", f"is a private key: give the public one, {PUBLIC_KEY}")
        raise wrong(Path(file), "", "is no public key: expected `(public-key (ecc (curve Ed25519) (q #...#)))`")
    if key.kind == "Ed25519" and not _POINT.fullmatch(key.parameters.get(b"q", b"")):
        raise wrong(Path(file), "q", "a point of Ed25519 has 32 bytes")
    return key


def read_public_key(path: Path) -> PublicKey:
    """Read a `.pub` file.

    Raises:
        ConfigError: it is none.
        NotFoundError, NotAllowedError, HostError: it cannot be read.
    """
    return parse_public_key(read_small(path, MAX_SIZE), str(path))


def make_signing_key(directory: Path, owner: Owner | None = None) -> KeyPair:
    """Make `signing-key.sec` and `signing-key.pub`, or what is missing of them; what is there stays.

    The private half comes first, and the public one is made from what then is there: the two always belong together.

    Args:
        directory: made when it is not there.
        owner: who must read the private key, the owner of the store; None: us.

    Raises:
        UsageError: the public half is there without the private one.
        ConfigError: a file that is there is no key, or the two halves are not of one key.
        NotAllowedError, HostError: a file cannot be read or written.
    """
    make_directory(directory, owner)
    public_path, private_path = directory / PUBLIC_KEY, directory / PRIVATE_KEY
    made = []
    with locked(directory):
        if not os.path.lexists(private_path):
            if os.path.lexists(public_path):
                hint = f"move it away: then both halves are made anew; or bring back {PRIVATE_KEY}"
                raise UsageError(f"is there without {PRIVATE_KEY}", subject=str(public_path), hint=hint)
            if publish_new(private_path, advanced(_generate()), PRIVATE_MODE, owner):
                made.append(private_path)
        public = _public_half(private_path)
        if publish_new(public_path, public.text, PUBLIC_MODE, owner):
            made.append(public_path)
        elif read_public_key(public_path) != public:
            raise wrong(public_path, "", f"does not belong to {private_path}")
    return KeyPair(directory=directory, public=public, made=tuple(made))


def _generate() -> tuple[Sexp, ...]:
    key = Ed25519PrivateKey.generate()
    # RFC 8032, 5.1.5: how EdDSA makes its scalar from a seed; then q is what the library says.
    digest = bytearray(hashlib.sha512(key.private_bytes_raw()).digest()[:32])
    digest[0] &= 0xF8
    digest[31] = digest[31] & 0x7F | 0x40
    q = key.public_key().public_bytes_raw()
    return (b"private-key", (b"ecc", (b"curve", _CURVE), (b"q", q), (b"d", bytes(reversed(digest)))))


def _public_half(path: Path) -> PublicKey:
    match parse_sexp(read_small(path, MAX_SIZE), str(path)):
        case (b"private-key", (bytes(algorithm), *pairs)) if algorithm in _PUBLIC_PARTS:
            parts = _PUBLIC_PARTS[algorithm]
            key = as_public_key((b"public-key", (algorithm, *(pair for pair in pairs if pair[:1] and pair[0] in parts))))
            if key is not None and parts[-1] in key.parameters:
                return key
    raise wrong(path, "", "is no private key of a kind that is known here")


def _parameters(pairs: Iterable[Sexp]) -> dict[bytes, bytes]:
    """The first value of each `(NAME VALUE ...)`; nothing when one is no such thing, or a name is there twice."""
    found: dict[bytes, bytes] = {}
    for pair in pairs:
        match pair:
            case (bytes(name), bytes(value), *_) if name not in found:
                found[name] = value
            case _:
                return {}
    return found


def _as_text(word: bytes) -> str:
    return word.decode("ascii", "backslashreplace")
