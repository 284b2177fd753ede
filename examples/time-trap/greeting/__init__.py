"""A greeting over TLS: enough of a program to have a test suite that needs a certificate."""

from greeting.tls import ask, client_context, greet, server_context

__all__ = ["ask", "client_context", "greet", "server_context"]
