"""libgcrypt, through ctypes: what Guix itself reads, writes and signs with."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

CANONICAL, ADVANCED = 1, 3


class Gcrypt:
    """Raises OSError where it is not installed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libgcrypt.so.20")
        self._library.gcry_check_version(None)
        self._library.gcry_sexp_sprint.restype = ctypes.c_size_t

    @contextmanager
    def expression(self, text: bytes) -> Iterator[ctypes.c_void_p | None]:
        """None when libgcrypt does not take it."""
        found = ctypes.c_void_p()
        if self._library.gcry_sexp_new(ctypes.byref(found), text, ctypes.c_size_t(len(text)), 1):
            yield None
            return
        try:
            yield found
        finally:
            self._library.gcry_sexp_release(found)

    def print(self, text: bytes, form: int) -> bytes | None:
        """The expression in another form; None when libgcrypt does not take it."""
        with self.expression(text) as found:
            return None if found is None else self._print(found, form)

    def _print(self, expression: ctypes.c_void_p, form: int) -> bytes:
        sprint = self._library.gcry_sexp_sprint
        size = sprint(expression, form, None, ctypes.c_size_t(0))
        buffer = ctypes.create_string_buffer(size + 1)
        written = sprint(expression, form, buffer, ctypes.c_size_t(size))
        # The size that it asks for has a null byte at the end, which is no part of the text.
        return buffer.raw[:written].removesuffix(b"\0")

    def is_good(self, private: bytes) -> bool:
        """Whether point and scalar of a private key belong together."""
        with self.expression(private) as key:
            return key is not None and int(self._library.gcry_pk_testkey(key)) == 0

    def sign(self, data: bytes, private: bytes) -> bytes:
        signature = ctypes.c_void_p()
        with self.expression(data) as what, self.expression(private) as key:
            assert self._library.gcry_pk_sign(ctypes.byref(signature), what, key) == 0
        try:
            return self._print(signature, ADVANCED)
        finally:
            self._library.gcry_sexp_release(signature)

    def verify(self, signature: bytes, data: bytes, public: bytes) -> bool:
        with self.expression(signature) as made, self.expression(data) as what, self.expression(public) as key:
            return int(self._library.gcry_pk_verify(made, what, key)) == 0
