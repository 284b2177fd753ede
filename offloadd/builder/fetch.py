"""The sources of a recipe: fetched on the host, checked, and kept by their digest.

A guest with a shifted clock cannot speak TLS to the world of today, and a build has no network; so whatever a build needs from
outside comes this way.  How files are kept: `offloadd.builder.kept`.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import trio

from offloadd.builder import pypi
from offloadd.builder.archive import Archive
from offloadd.builder.kept import WORTH_BYTES, PartialFile, find_kept, open_resumed, sweep
from offloadd.builder.pypi import redacted
from offloadd.errors import FetchError, HostError, SourceError
from offloadd.model.recipe import Source

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes that are there, and the bytes in all (None: not known)."""

MAX_SOURCE_BYTES = 8 * 1024**3
_MAX_PAGE_BYTES = 128 * 1024**2
"""The largest page of a public index has some 10 MB."""
_PIECE_BYTES = 1024**2
_STALL_S = 60.0
_AGAIN_S = 1.0
"""Between a connection that broke off and the next one."""
# Where other tools look for the authority of a proxy that opens TLS; ssl itself reads SSL_CERT_FILE and SSL_CERT_DIR.
_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_PROXY_HINT = "write HTTPS_PROXY as http://HOST:PORT"


async def fetch_sources(
    sources: Sequence[Source], archive: Archive, progress: Progress, *, max_bytes: int = MAX_SOURCE_BYTES
) -> list[Path]:
    """Fetch what is not kept yet; return the path of each of `sources` in their order, of a Debian source package its files'.

    Proxies and certificate authorities are those of the environment, those of pip's configuration when a source comes from its
    package index, and apt's for Debian's.  The caller sets the time limit.

    Args:
        archive: the Debian source packages of the recipe's suite; everything that is fetched is kept in `archive.kept`.
    Raises:
        SourceError: a source is not what the recipe says, or two of them would have the same name in the build directory.
        NotFoundError: the suite does not have a Debian source package.
        FetchError: the network, a proxy or a server failed.
        HostError: the cache cannot be written, or pip or apt is missing.
    """
    cache_root = archive.kept
    try:
        await trio.to_thread.run_sync(sweep, cache_root)
        found = {source: await _find_kept(source, cache_root) for source in dict.fromkeys(sources)}
        missing = [source for source, paths in found.items() if not paths]
        if any(source.debian is None for source in missing):
            settings = await _settings_for(missing)
            async with _open_client(settings) as client:
                fetcher = _Fetcher(client, settings, cache_root, progress, max_bytes)
                for source in missing:
                    if source.debian is None:
                        found[source] = [await fetcher.fetch(source)]
        for source in missing:
            if source.debian is not None:
                found[source] = await _fetch_debian(source.debian, archive, progress)
    except OSError as exc:
        raise HostError(f"cannot keep sources: {exc.strerror or exc}", subject=str(cache_root)) from exc
    paths = [path for source in sources for path in found[source]]
    _refuse_same_names(paths)
    return paths


async def _fetch_debian(wanted: str, archive: Archive, progress: Progress) -> list[Path]:
    def tell(phase: str, fraction: float | None) -> None:
        progress(wanted, 0, None)

    name, _, version = wanted.partition("=")
    package = await archive.fetch(name, version or None, tell)
    return list(package.files)


async def _settings_for(sources: Sequence[Source]) -> pypi.PipSettings:
    if any(source.pypi for source in sources):
        return await pypi.read_pip_settings()
    return pypi.PipSettings(indexes=())


def _refuse_same_names(paths: Sequence[Path]) -> None:
    by_name: dict[str, Path] = {}
    for path in paths:
        if by_name.setdefault(path.name, path) != path:
            raise SourceError("two sources with different digests have this name", subject=path.name)


class _Fetcher:
    """One round of fetching over one HTTP client."""

    def __init__(
        self, client: httpx.AsyncClient, settings: pypi.PipSettings, cache_root: Path, progress: Progress, max_bytes: int
    ) -> None:
        self._client = client
        self._settings = settings
        self._cache_root = cache_root
        self._progress = progress
        self._max_bytes = max_bytes

    async def fetch(self, source: Source) -> Path:
        assert source.sha256 is not None
        if source.url is not None:
            return await self._fetch_file(source.url, _url_filename(source.url), source.sha256)
        candidate = await self._find_sdist(source, source.sha256)
        return await self._fetch_file(candidate.url, _checked_filename(candidate.filename), source.sha256)

    async def _find_sdist(self, source: Source, sha256: str) -> pypi.Candidate:
        assert source.pypi is not None
        name, _, version = source.pypi.partition("==")
        candidates: list[pypi.Candidate] = []
        failures: list[FetchError] = []
        for page_url in pypi.project_pages(self._settings, name):
            try:
                candidates += await self._read_page(page_url)
            except FetchError as exc:
                failures.append(exc)
                continue
            if any(candidate.sha256 == sha256 for candidate in candidates):
                break
        # A page that did not answer matters only when no other one has the file.
        chosen = pypi.choose(candidates, name=name, version=version, sha256=sha256)
        if chosen is not None:
            return chosen
        if failures:
            raise failures[0]
        raise SourceError("no package index that pip knows has this source distribution", subject=source.pypi)

    async def _read_page(self, page_url: str) -> list[pypi.Candidate]:
        if page_url.startswith("file:"):
            return await trio.to_thread.run_sync(_read_local_page, page_url)
        body = bytearray()
        async with _get(self._client, page_url, accept=pypi.ACCEPT) as response:
            if response.status_code in (404, 410):
                return []
            _check_status(response, page_url)
            async for piece in response.aiter_bytes(_PIECE_BYTES):
                body += piece
                if len(body) > _MAX_PAGE_BYTES:
                    raise SourceError("the page of the package index is too large", subject=redacted(page_url))
            content_type = response.headers.get("content-type", "")
            # Links are relative to where the page came from after redirections.
            found = pypi.read_page(pypi.with_login_of(page_url, str(response.url)), content_type, bytes(body))
            # What the network says may not name files of this host.
            return [candidate for candidate in found if not candidate.url.startswith("file:")]

    async def _fetch_file(self, url: str, filename: str, sha256: str) -> Path:
        with open_resumed(self._cache_root, filename, sha256, max_bytes=self._max_bytes) as growing:
            if url.startswith("file:"):
                await trio.to_thread.run_sync(growing.restart)
                await trio.to_thread.run_sync(growing.copy_from, _local_path(url))
                return await trio.to_thread.run_sync(growing.keep, redacted(url))
            await trio.to_thread.run_sync(growing.read_back)
            resumed = growing.size > 0
            if not growing.is_right:
                await self._stream_on(url, growing)
            if resumed and not growing.is_right:
                # The server's file is another one since then: its beginning too.
                await trio.to_thread.run_sync(growing.restart)
                await self._stream_on(url, growing)
            return await trio.to_thread.run_sync(growing.keep, redacted(url))

    async def _stream_on(self, url: str, growing: PartialFile) -> None:
        """Fetch to the end; as long as each try brings something, a connection that breaks off is no failure."""
        while True:
            before = growing.size
            try:
                await self._stream(url, growing)
                return
            except FetchError:
                if growing.size < before + WORTH_BYTES:
                    raise
            await trio.sleep(_AGAIN_S)

    async def _stream(self, url: str, growing: PartialFile) -> None:
        async with _get(self._client, url, accept="*/*", begin=growing.size) as response:
            again = False
            if growing.size and response.status_code in (200, 206, 416) and not _goes_on(response, growing.size):
                # It begins anew; or what comes is another part, or none, as we have more than there is.
                await trio.to_thread.run_sync(growing.restart)
                again = response.status_code != 200
            if not again:
                await self._take(response, url, growing)
                return
        await self._stream(url, growing)

    async def _take(self, response: httpx.Response, url: str, growing: PartialFile) -> None:
        _check_status(response, url)
        length = response.headers.get("content-length", "")
        total = growing.size + int(length) if length.isdecimal() else None
        growing.check_size(total or 0)
        self._progress(growing.filename, growing.size, total)
        # The digest is that of the file as it lies on the server, so no content encoding is taken off.
        async for piece in response.aiter_raw(_PIECE_BYTES):
            await trio.to_thread.run_sync(growing.write, piece)
            self._progress(growing.filename, growing.size, total)


def _goes_on(response: httpx.Response, size: int) -> bool:
    """Whether a partial answer begins where we have ended (RFC 9110, 14.4)."""
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {size}-")


@asynccontextmanager
async def _get(client: httpx.AsyncClient, url: str, *, accept: str, begin: int = 0) -> AsyncIterator[httpx.Response]:
    headers = {"Accept": accept, "Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
    # The HTTP library logs addresses, so a password must not be in one.
    address, login = pypi.split_login(url)
    try:
        async with client.stream("GET", address, headers=headers, auth=login) as response:
            yield response
    except httpx.TimeoutException as exc:
        raise FetchError(f"no answer for {_STALL_S:.0f} s", subject=redacted(url)) from exc
    except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as exc:
        raise SourceError(str(exc) or type(exc).__name__, subject=redacted(url)) from exc
    except httpx.HTTPError as exc:
        hint = "is a proxy needed (HTTPS_PROXY), or a certificate authority (SSL_CERT_FILE)?"
        raise FetchError(f"cannot be fetched: {str(exc) or type(exc).__name__}", subject=redacted(url), hint=hint) from exc


def _check_status(response: httpx.Response, url: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    what = f"the server says {status} {response.reason_phrase}".rstrip()
    # 408, 425 and 429 ask for another try, as do the server's own failures; 407 is the proxy's.
    if status in (407, 408, 425, 429) or status >= 500:
        raise FetchError(what, subject=redacted(url))
    raise SourceError(what, subject=redacted(url), hint="is the address in the recipe right?")


@asynccontextmanager
async def _open_client(settings: pypi.PipSettings) -> AsyncIterator[httpx.AsyncClient]:
    trust = _trust(settings)
    try:
        client = httpx.AsyncClient(verify=trust, proxy=settings.proxy or None, follow_redirects=True, timeout=_STALL_S)
    except (ValueError, ImportError, httpx.InvalidURL) as exc:
        # Its text is left out: it may hold the proxy's password.
        raise HostError("a proxy of the environment or of pip's configuration cannot be used", hint=_PROXY_HINT) from exc
    async with client:
        yield client


def _trust(settings: pypi.PipSettings) -> ssl.SSLContext:
    """The system's certificate authorities, and those that the environment and pip's configuration add."""
    context = ssl.create_default_context()
    for place in (settings.cert, *(os.environ.get(variable, "") for variable in _CA_VARIABLES)):
        if place:
            _trust_place(context, Path(place))
    if settings.client_cert:
        context.load_cert_chain(settings.client_cert)
    return context


def _trust_place(context: ssl.SSLContext, place: Path) -> None:
    try:
        context.load_verify_locations(capath=place) if place.is_dir() else context.load_verify_locations(cafile=place)
    except OSError as exc:
        raise HostError("certificate authorities cannot be read from here", subject=str(place)) from exc


async def _find_kept(source: Source, cache_root: Path) -> list[Path]:
    """The file that is kept; none of a Debian source package, of which the archive knows better."""
    if source.sha256 is None:
        return []
    path = await trio.to_thread.run_sync(find_kept, cache_root, source.sha256, partial(_is_named, source))
    return [path] if path else []


def _is_named(source: Source, filename: str) -> bool:
    if source.url is not None:
        return filename == _url_filename(source.url)
    assert source.pypi is not None
    name, _, version = source.pypi.partition("==")
    return pypi.is_sdist(filename, name, version)


def _url_filename(url: str) -> str:
    return _checked_filename(unquote(urlsplit(url).path).rsplit("/", 1)[-1])


def _checked_filename(filename: str) -> str:
    """`filename`, or SourceError when it is not a plain file name: it is used on the host and in the build directory."""
    plain = filename not in ("", ".", "..") and "/" not in filename and filename.isprintable()
    if not plain or len(os.fsencode(filename)) > 255:
        raise SourceError("the address does not end in a file name", subject=repr(filename[:80]))
    return filename


def _local_path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def _read_local_page(page_url: str) -> list[pypi.Candidate]:
    """The links of a local index, or the files of a directory."""
    path = _local_path(page_url)
    page = path / "index.html" if path.is_dir() else path
    if page.is_file():
        return pypi.read_page(page_url, "text/html", page.read_bytes())
    if path.is_dir():
        return [pypi.Candidate(filename=entry.name, url=entry.as_uri()) for entry in sorted(path.iterdir()) if entry.is_file()]
    return []
