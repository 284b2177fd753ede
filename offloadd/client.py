"""The way to the daemon: HTTP on its Unix socket.  When none answers, the user's own daemon is started in the background.

Synchronous, and on the standard library's HTTP client: the command line does one thing at a time, and it starts three times as
fast as with a larger library.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from offloadd.errors import DaemonError, OffloadError, UsageError, error_from_json
from offloadd.paths import Paths, check_ours, find_paths, make_private

IDLE_TIMEOUT = "15m"
"""After which a daemon that was started in the background ends."""
START_S = 20.0
CONNECT_S = 5.0
TRY_AGAIN_S = 1.5
"""More than a daemon needs to come up."""
PIECE = 64 * 1024

Json = dict[str, Any]
Body = bytes | Iterable[bytes] | None

_LOST = (OSError, HTTPException)


class _Connection(HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path, quiet_s: float | None) -> None:
        super().__init__("offloadd")
        self._path = path
        self._quiet_s = quiet_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(CONNECT_S)
        self.sock.connect(str(self._path))
        # Usually no limit on reading: a build may be silent for an hour, and the daemon ends with its socket.
        self.sock.settimeout(self._quiet_s)


class Client:
    """The daemon's API.  Each request has a connection of its own, so that threads may share nothing."""

    def __init__(self, paths: Paths | None = None) -> None:
        self.paths = paths or find_paths()
        check_ours(self.paths.runtime)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answers(self) -> bool:
        """Whether a daemon serves."""
        try:
            with self._open("GET", "/v1/status") as response:
                response.read()
        except _LOST:
            return False
        return True

    def ensure_daemon(self) -> None:
        """Start the user's own daemon when none answers.

        Raises:
            DaemonError: it does not come up; with the end of its log.
        """
        if self.answers():
            return
        log = make_private(self.paths.state) / self.paths.daemon_log.name
        before = log.stat().st_size if log.exists() else 0
        began = time.monotonic()
        daemon, tried = _spawn(log), began
        while (now := time.monotonic()) < began + START_S:
            # A second `offload` may have been faster: its daemon is as good as ours, which then ends at once.
            if self.answers():
                return
            if daemon.poll() is not None:
                if not self._somebody_else(daemon):
                    break
                # Unless that one was just ending.
                if now > tried + TRY_AGAIN_S:
                    daemon, tried = _spawn(log), now
            time.sleep(0.02)
        raise DaemonError("the daemon does not start", subject="offloadd", detail=_end_of(log, before), hint="offload doctor")

    def _somebody_else(self, daemon: subprocess.Popen[bytes]) -> bool:
        return daemon.returncode == 6  # NotAllowedError: runs already for this user

    def get(self, path: str, **query: Any) -> Any:
        return self._request("GET", f"{path}?{urlencode(query)}" if query else path)

    def post(self, path: str, body: Any = None) -> Any:
        return self._request("POST", path, None if body is None else json.dumps(body).encode())

    def delete(self, path: str, **query: Any) -> Any:
        return self._request("DELETE", f"{path}?{urlencode(query)}" if query else path)

    @contextmanager
    def _open(self, method: str, path: str, body: Body = None, *, quiet_s: float | None = None) -> Iterator[HTTPResponse]:
        """Send a request; the response, to be read inside of the block."""
        connection = _Connection(self.paths.socket, quiet_s)
        try:
            chunked = body is not None and not isinstance(body, bytes)
            # Else the daemon keeps its side open for a next request, which never comes.
            headers = {"Connection": "close"}
            headers |= {"Content-Type": "application/json"} if isinstance(body, bytes) else {}
            headers |= {"Transfer-Encoding": "chunked"} if chunked else {}
            with suppress(BrokenPipeError):  # an answer came before all was sent: it says why
                connection.request(method, path, body, headers, encode_chunked=chunked)
            yield connection.getresponse()
        finally:
            connection.close()

    def get_bytes(self, path: str) -> bytes:
        """What is no JSON; small enough for the memory."""
        return self._ask("GET", path, None)

    def _request(self, method: str, path: str, body: Body = None) -> Any:
        return json.loads(self._ask(method, path, body))

    def _ask(self, method: str, path: str, body: Body) -> bytes:
        try:
            with self._open(method, path, body) as response:
                data = response.read()
        except _LOST as exc:
            raise DaemonError(f"does not answer: {exc}", subject="offloadd", hint="offload daemon status") from exc
        if response.status >= 400:
            raise _error(response.status, data)
        return data

    def stream(self, method: str, path: str, *, body: Any = None, quiet_s: float | None = None) -> Iterator[Json]:
        """The events of an answer in JSON lines, as they come.

        Args:
            body: what is sent, as JSON.
            quiet_s: end without a word when nothing came for this long; None waits for the end of the answer.
        """
        try:
            sent = None if body is None else json.dumps(body).encode()
            with self._open(method, path, sent, quiet_s=quiet_s) as response:
                if response.status >= 400:
                    raise _error(response.status, response.read())
                for line in _lines(iter(lambda: response.read1(PIECE), b"")):
                    yield json.loads(line)
        except ValueError as exc:
            raise DaemonError("sent an event that is no JSON", subject="offloadd", hint="offload daemon status") from exc
        except TimeoutError:
            return
        except _LOST as exc:
            raise DaemonError(f"went away: {exc}", subject="offloadd", hint="offload daemon status") from exc

    def create_build(self, request: Json, source: Iterable[bytes]) -> str:
        """Ask for a build and send its source, a tar in pieces; the build's id.

        Args:
            request: a `BuildRequest`, as `/v1/requests` gives it.
        """
        build: str = self.post("/v1/builds", request)["build"]
        try:
            self._request("PUT", f"/v1/builds/{build}/source", source)
        except DaemonError:
            raise
        except BaseException:
            # The source cannot be read, or the user does not want it any more.
            self.cancel_build(build)
            raise
        return build

    def cancel_build(self, build: str) -> None:
        with suppress(OffloadError):  # it has ended, or the daemon has: there is nothing left to cancel
            self.post(f"/v1/builds/{build}/cancel")

    def fetch_outputs(self, build: str, target: Path) -> bool:
        """Write the outputs, a tar, to `target`; False when the build has none."""
        try:
            with self._open("GET", f"/v1/builds/{build}/outputs") as response:
                if response.status == 404:
                    return False
                if response.status >= 400:
                    raise _error(response.status, response.read())
                with target.open("wb") as file:
                    while piece := response.read1(PIECE):
                        file.write(piece)
                if response.length:  # what is missing; read1 does not tell
                    raise ConnectionError("it sent a part of the outputs")
        except (ConnectionError, HTTPException) as exc:
            raise DaemonError(f"went away: {exc}", subject="offloadd", hint="offload daemon status") from exc
        return True


def _spawn(log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "offloadd.daemon.main", "--idle-timeout", IDLE_TIMEOUT]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True
        )


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What stands between newlines."""
    rest: list[bytes] = []
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for line in whole:
            if text := b"".join([*rest, line]):
                yield text
            rest.clear()
        rest.append(last)


def _error(status: int, data: bytes) -> OffloadError:
    try:
        error = error_from_json(json.loads(data))
        if isinstance(error, UsageError) and status in (404, 405):
            error.hint = "the daemon is of another version; after `offload daemon stop` the next command starts its own"
        return error
    except (ValueError, TypeError, KeyError, AttributeError):
        detail = data.decode(errors="replace")[:2000]
        return DaemonError(f"answered {status}", subject="offloadd", detail=detail, hint="offload daemon status")


def _end_of(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begin, os.fstat(file.fileno()).st_size - 4000))
        return file.read().decode(errors="replace")
