"""The way to the daemon: HTTP on its Unix socket.  When none answers, the user's own daemon is started in the background.

Synchronous on purpose: the command line does one thing at a time, and starts faster without an event loop.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from offloadd.errors import DaemonError, OffloadError, error_from_json
from offloadd.paths import Paths, check_ours, find_paths, make_private

if TYPE_CHECKING:
    # pydantic takes a tenth of a second to import, and most commands do without.
    from offloadd.model.recipe import BuildRequest

IDLE_TIMEOUT = "15m"
"""After which a daemon that was started in the background ends."""
START_S = 20.0
TRY_AGAIN_S = 1.5
"""More than a daemon needs to come up."""

Json = dict[str, Any]


class Client:
    """One connection to the daemon.  Use it as a context manager."""

    def __init__(self, paths: Paths | None = None) -> None:
        self.paths = paths or find_paths()
        check_ours(self.paths.runtime)
        # No TLS on a Unix socket: by default all certificates of the host would be loaded, which takes longer than a request.
        transport = httpx.HTTPTransport(uds=str(self.paths.socket), verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        # No limit on reading: a build may be silent for an hour, and the daemon ends with its socket.
        self._http = httpx.Client(transport=transport, base_url="http://offloadd", timeout=httpx.Timeout(None, connect=5))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def answers(self) -> bool:
        """Whether a daemon serves."""
        try:
            self._http.get("/v1/status")
        except httpx.TransportError:
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
        return self._request("GET", path, params=query or None)

    def post(self, path: str, body: Any = None) -> Any:
        return self._request("POST", path, json=body)

    def delete(self, path: str) -> Any:
        return self._request("DELETE", path)

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as exc:
            raise DaemonError(f"does not answer: {exc}", subject="offloadd", hint="offload daemon status") from exc
        if response.is_error:
            raise _error(response)
        return response.json()

    def stream(self, method: str, path: str, *, quiet_s: float | None = None) -> Iterator[Json]:
        """The events of an answer in JSON lines, as they come.

        Args:
            quiet_s: end without a word when nothing came for this long; None waits for the end of the answer.
        """
        try:
            with self._http.stream(method, path, timeout=httpx.Timeout(None, connect=5, read=quiet_s)) as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                for line in _lines(response.iter_bytes()):
                    yield json.loads(line)
        except ValueError as exc:
            raise DaemonError("sent an event that is no JSON", subject="offloadd", hint="offload daemon status") from exc
        except httpx.ReadTimeout:
            return
        except httpx.TransportError as exc:
            raise DaemonError(f"went away: {exc}", subject="offloadd", hint="offload daemon status") from exc

    def create_build(self, request: BuildRequest, source: Iterable[bytes]) -> str:
        """Ask for a build and send its source, a tar in pieces; the build's id."""
        build: str = self.post("/v1/builds", request.to_json())["build"]
        try:
            response = self._http.put(f"/v1/builds/{build}/source", content=source)
        except httpx.TransportError as exc:
            raise DaemonError(f"went away: {exc}", subject="offloadd", hint="offload daemon status") from exc
        except BaseException:
            # The source cannot be read, or the user does not want it any more.
            self.cancel_build(build)
            raise
        if response.is_error:
            raise _error(response)
        return build

    def cancel_build(self, build: str) -> None:
        with suppress(OffloadError):  # it has ended, or the daemon has: there is nothing left to cancel
            self.post(f"/v1/builds/{build}/cancel")

    def fetch_outputs(self, build: str, target: Path) -> bool:
        """Write the outputs, a tar, to `target`; False when the build has none."""
        try:
            with self._http.stream("GET", f"/v1/builds/{build}/outputs") as response:
                if response.status_code == httpx.codes.NOT_FOUND:
                    return False
                if response.is_error:
                    response.read()
                    raise _error(response)
                with target.open("wb") as file:
                    for piece in response.iter_bytes():
                        file.write(piece)
        except httpx.TransportError as exc:
            raise DaemonError(f"went away: {exc}", subject="offloadd", hint="offload daemon status") from exc
        return True


def _spawn(log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "offloadd.daemon.main", "--idle-timeout", IDLE_TIMEOUT]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True
        )


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What stands between newlines.  httpx's own lines also end at characters that a build may print, as U+2028."""
    rest: list[bytes] = []
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        for line in whole:
            if text := b"".join([*rest, line]):
                yield text
            rest.clear()
        rest.append(last)


def _error(response: httpx.Response) -> OffloadError:
    try:
        return error_from_json(response.json())
    except (ValueError, TypeError, KeyError, AttributeError):
        detail = response.text[:2000]
        return DaemonError(f"answered {response.status_code}", subject="offloadd", detail=detail, hint="offload daemon status")


def _end_of(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begin, os.fstat(file.fileno()).st_size - 4000))
        return file.read().decode(errors="replace")
