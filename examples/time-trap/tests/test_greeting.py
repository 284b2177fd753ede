"""The whole way: a server and a client that speak TLS with each other.

The certificate was made once, with fixed dates, as many test suites have it: so this suite passes in 2019 and 2020 only.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import unittest
from pathlib import Path

from greeting import ask, client_context, greet, server_context

CERTIFICATES = Path(__file__).parent / "certificates"
SERVER = "greeting.test"


class GreetingTest(unittest.TestCase):
    def setUp(self) -> None:
        self.client_end, self.server_end = socket.socketpair()
        self.addCleanup(self.client_end.close)
        self.client_end.settimeout(30)
        self.server_end.settimeout(30)
        thread = threading.Thread(target=self._serve)
        thread.start()
        self.addCleanup(thread.join)

    def _serve(self) -> None:
        context = server_context(CERTIFICATES / "server.pem", CERTIFICATES / "server-key.pem")
        # What goes wrong is for the client's side to see.
        with self.server_end, contextlib.suppress(OSError):
            greet(self.server_end, context)

    def test_greets_by_name(self) -> None:
        answer = ask(self.client_end, client_context(CERTIFICATES / "authority.pem"), server=SERVER, name="Ada")
        self.assertEqual(answer, "Hello, Ada!")

    def test_other_server_is_refused(self) -> None:
        with self.assertRaises(ssl.SSLCertVerificationError):
            ask(self.client_end, client_context(CERTIFICATES / "authority.pem"), server="other.test", name="Ada")

    def test_unknown_authority_is_refused(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with self.assertRaises(ssl.SSLCertVerificationError):
            ask(self.client_end, context, server=SERVER, name="Ada")


if __name__ == "__main__":
    unittest.main()
