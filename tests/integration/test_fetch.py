"""Fetching sources from a real HTTP server on loopback."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trio

from offloadd.builder.archive import Archive
from offloadd.builder.fetch import fetch_sources
from offloadd.errors import FetchError, HostError, NotFoundError, OffloadError, SourceError
from offloadd.model.recipe import Source

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ELSEWHERE = "0" * 64


@dataclass
class Server:
    """An HTTP server on loopback: what it answers, and what it was asked."""

    url: str = ""
    pages: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    break_off_after: int = 0
    """Bytes of each answer after which the connection is closed; 0: none is."""
    takes_ranges: bool = True
    logins: list[str] = field(default_factory=list)
    stall: threading.Event = field(default_factory=threading.Event)
    """While it is not set, `/stall` sends half of its content."""

    def put(self, path: str, body: bytes, *, status: int = 200, **headers: str) -> str:
        self.pages[path] = (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)
        return self.url + path


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            state.logins.append(self.headers.get("Authorization", ""))
            wanted = self.headers.get("Range", "")
            state.ranges.append(wanted)
            status, headers, body = state.pages.get(self.path, (404, {}, b"nothing here"))
            if wanted and state.takes_ranges and status == 200:
                begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
                part = {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
                status, headers, body = (206, headers | part, body[begin:]) if begin < len(body) else (416, headers, b"")
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if state.break_off_after:
                self.wfile.write(body[: state.break_off_after])
                self.close_connection = True
                return
            if self.path.startswith("/stall"):
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                state.stall.wait(30)
                return
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    state.stall.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, and no setting of pip but the test's own."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/no-index")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "sources"


def quiet(name: str, done: int, total: int | None) -> None:
    pass


async def fetch_one(source: Source, cache: Path, **options: int) -> Path:
    [path] = await fetch_sources([source], Archive(cache.parent, "bookworm"), quiet, **options)
    return path


def assert_begun(cache: Path, content: bytes) -> None:
    """The beginning waits for its end, and nothing else is there."""
    [path] = [path for path in cache.rglob("*") if path.is_file()]
    assert path.name == f".resumed-{SHA256}"
    assert 0 < path.stat().st_size <= len(content)
    assert content.startswith(path.read_bytes())


def assert_nothing_kept(cache: Path) -> None:
    assert [path for path in cache.rglob("*") if path.is_file()] == []


async def test_fetches_once_and_keeps(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/a/thing%2B1.tar.gz?token=x", CONTENT), sha256=SHA256)
    seen: list[tuple[str, int, int | None]] = []
    [path] = await fetch_sources([source], Archive(cache.parent, "bookworm"), lambda *args: seen.append(args))
    assert path == cache / SHA256 / "thing+1.tar.gz"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o644
    assert seen[0] == ("thing+1.tar.gz", 0, len(CONTENT))
    assert seen[-1] == ("thing+1.tar.gz", len(CONTENT), len(CONTENT))
    assert await fetch_one(source, cache) == path
    assert len(server.asked) == 1
    assert sorted(entry.name for entry in cache.iterdir()) == [SHA256]


async def test_keeps_the_order(server: Server, cache: Path) -> None:
    sources = []
    for at in range(3):
        body = f"content {at}".encode()
        sources.append(Source(url=server.put(f"/file-{at}", body), sha256=hashlib.sha256(body).hexdigest()))
    await fetch_one(sources[1], cache)
    paths = await fetch_sources([*sources, sources[0]], Archive(cache.parent, "bookworm"), quiet)
    assert [path.name for path in paths] == ["file-0", "file-1", "file-2", "file-0"]
    assert server.asked == ["/file-1", "/file-0", "/file-2"]


async def test_damaged_file_is_fetched_again(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/thing.zip", CONTENT), sha256=SHA256)
    path = await fetch_one(source, cache)
    path.write_bytes(CONTENT[:-1])
    assert (await fetch_one(source, cache)).read_bytes() == CONTENT
    assert len(server.asked) == 2


async def test_wrong_digest(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/thing.zip", CONTENT), sha256=ELSEWHERE)
    with pytest.raises(SourceError, match="another digest") as caught:
        await fetch_one(source, cache)
    assert caught.value.exit_status == 3
    assert SHA256 in caught.value.detail
    assert_nothing_kept(cache)


@pytest.mark.parametrize(
    ("status", "error"), [(404, SourceError), (403, SourceError), (429, FetchError), (500, FetchError), (503, FetchError)]
)
async def test_status(server: Server, cache: Path, status: int, error: type[OffloadError]) -> None:
    source = Source(url=server.put("/thing.zip", b"sorry", status=status), sha256=SHA256)
    with pytest.raises(error, match=str(status)):
        await fetch_one(source, cache)
    assert_nothing_kept(cache)


async def test_refused_connection(cache: Path) -> None:
    # Port 1 of loopback: nobody listens there.
    with pytest.raises(FetchError, match="cannot be fetched") as caught:
        await fetch_one(Source(url="http://user:secret@127.0.0.1:1/thing.zip", sha256=SHA256), cache)
    assert caught.value.retryable
    assert "secret" not in caught.value.render()


async def test_too_large(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/thing.zip", CONTENT), sha256=SHA256)
    with pytest.raises(SourceError, match="larger than the limit"):
        await fetch_one(source, cache, max_bytes=len(CONTENT) - 1)
    assert_nothing_kept(cache)


async def test_too_large_without_a_length(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/thing.zip", CONTENT, Content_Length="", Connection="close"), sha256=SHA256)
    with pytest.raises(SourceError, match="larger than the limit"):
        await fetch_one(source, cache, max_bytes=1000)
    assert_nothing_kept(cache)


async def test_truncated(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/thing.zip", CONTENT, Content_Length=str(len(CONTENT) + 1)), sha256=SHA256)
    server.takes_ranges = False
    with pytest.raises(FetchError):
        await fetch_one(source, cache)
    assert_begun(cache, CONTENT)


async def test_cancelled(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/stall.zip", CONTENT), sha256=SHA256)
    resumed = cache / f".resumed-{SHA256}"
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch_one, source, cache)
            while not resumed.exists() or not resumed.stat().st_size:
                await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
    assert_begun(cache, CONTENT)
    begun = resumed.stat().st_size
    again = await fetch_one(Source(url=server.put("/again.zip", CONTENT), sha256=SHA256), cache)
    assert again.read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={begun}-"
    assert [path for path in cache.rglob("*") if path.is_file()] == [again]


async def test_a_connection_that_breaks_off_goes_on_where_it_ended(server: Server, cache: Path) -> None:
    server.break_off_after = 1 << 20
    source = Source(url=server.put("/thing.zip", CONTENT), sha256=SHA256)
    seen: list[tuple[str, int, int | None]] = []
    [path] = await fetch_sources([source], Archive(cache.parent, "bookworm"), lambda *args: seen.append(args))
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["", f"bytes={1 << 20}-", f"bytes={2 << 20}-"]
    assert {total for _, _, total in seen} == {len(CONTENT)}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


async def test_a_file_that_is_another_one_by_now_is_fetched_from_its_beginning(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f".resumed-{SHA256}").write_bytes(os.urandom(2 << 20))
    source = Source(url=server.put("/thing.zip", CONTENT), sha256=SHA256)
    assert (await fetch_one(source, cache)).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={2 << 20}-", ""]


@pytest.mark.parametrize("takes_ranges", [True, False])
async def test_a_beginning_that_is_longer_than_the_file(server: Server, cache: Path, takes_ranges: bool) -> None:
    cache.mkdir(parents=True)
    (cache / f".resumed-{SHA256}").write_bytes(CONTENT + bytes(1000))
    server.takes_ranges = takes_ranges
    source = Source(url=server.put("/thing.zip", CONTENT), sha256=SHA256)
    assert (await fetch_one(source, cache)).read_bytes() == CONTENT


async def test_what_is_whole_already_is_not_asked_for(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f".resumed-{SHA256}").write_bytes(CONTENT)
    assert (await fetch_one(Source(url=f"{server.url}/gone.zip", sha256=SHA256), cache)).read_bytes() == CONTENT
    assert server.asked == []


async def test_a_server_that_is_down_costs_no_beginning(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f".resumed-{SHA256}").write_bytes(CONTENT[: 2 << 20])
    with pytest.raises(FetchError, match="503"):
        await fetch_one(Source(url=server.put("/thing.zip", b"sorry", status=503), sha256=SHA256), cache)
    assert_begun(cache, CONTENT)


async def test_redirection(server: Server, cache: Path) -> None:
    server.put("/real.zip", CONTENT)
    source = Source(url=server.put("/thing.zip", b"", status=302, Location="/real.zip"), sha256=SHA256)
    assert (await fetch_one(source, cache)).name == "thing.zip"


async def test_endless_redirection(server: Server, cache: Path) -> None:
    source = Source(url=server.put("/thing.zip", b"", status=302, Location="/thing.zip"), sha256=SHA256)
    with pytest.raises(SourceError):
        await fetch_one(source, cache)


@pytest.mark.parametrize("path", ["", "/", "/a/", "/..", "/a%2Fb/..%2F..", "/%00", "/a%0Ab", "/" + "a" * 256])
async def test_no_file_name(cache: Path, path: str) -> None:
    with pytest.raises(SourceError):
        await fetch_one(Source(url="http://127.0.0.1:1" + path, sha256=SHA256), cache)


async def test_same_name_twice(server: Server, cache: Path) -> None:
    one = Source(url=server.put("/1/thing.zip", b"one"), sha256=hashlib.sha256(b"one").hexdigest())
    two = Source(url=server.put("/2/thing.zip", b"two"), sha256=hashlib.sha256(b"two").hexdigest())
    with pytest.raises(SourceError, match="have this name"):
        await fetch_sources([one, two], Archive(cache.parent, "bookworm"), quiet)


async def test_proxy(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("http://far-away.test/thing.zip", CONTENT)
    monkeypatch.setenv("http_proxy", server.url)
    path = await fetch_one(Source(url="http://far-away.test/thing.zip", sha256=SHA256), cache)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["http://far-away.test/thing.zip"]


async def test_useless_proxy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "gopher://user:secret@proxy.test:70")
    with pytest.raises(HostError, match="proxy") as caught:
        await fetch_one(Source(url="http://far-away.test/thing.zip", sha256=SHA256), cache)
    assert "secret" not in caught.value.render()


async def test_cache_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HostError, match="cannot keep sources"):
        await fetch_one(Source(url=server.put("/thing.zip", CONTENT), sha256=SHA256), tmp_path / "file" / "cache")


async def test_partial_files_of_the_dead_are_removed(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    old, fresh, held = cache / ".partial-old", cache / ".partial-fresh", cache / ".partial-held"
    for path in (old, fresh, held):
        path.write_bytes(b"half")
    for path in (old, held):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    with held.open("rb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        await fetch_one(Source(url=server.put("/thing.zip", CONTENT), sha256=SHA256), cache)
    assert (old.exists(), fresh.exists(), held.exists()) == (False, True, True)


def put_index(server: Server, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", server.url + "/simple")
    server.put("/simple/some-thing/", page.encode(), Content_Type="text/html")


SDIST = Source(pypi="Some.Thing==1.0", sha256=SHA256)


async def test_sdist_from_an_index(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_index(
        server,
        monkeypatch,
        f"<a href='../../f/some_thing-1.0-py3-none-any.whl#sha256={ELSEWHERE}'>w</a>"
        f"<a href='../../f/some_thing-1.0.tar.gz#sha256={SHA256}'>s</a>",
    )
    server.put("/f/some_thing-1.0.tar.gz", CONTENT)
    path = await fetch_one(SDIST, cache)
    assert path == cache / SHA256 / "some_thing-1.0.tar.gz"
    asked = len(server.asked)
    assert await fetch_one(SDIST, cache) == path
    # What is kept needs no index.
    assert len(server.asked) == asked


async def test_sdist_runs_nothing(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fetched file is not even an archive: nobody looked inside."""
    put_index(server, monkeypatch, "<a href='/f/some-thing-1.0.zip'>s</a>")
    server.put("/f/some-thing-1.0.zip", CONTENT)
    assert (await fetch_one(SDIST, cache)).read_bytes() == CONTENT


async def test_sdist_with_a_login(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_index(server, monkeypatch, "<a href='/f/some-thing-1.0.zip'>s</a>")
    server.put("/f/some-thing-1.0.zip", CONTENT)
    monkeypatch.setenv("PIP_INDEX_URL", server.url.replace("//", "//me:secret@") + "/simple")
    await fetch_one(SDIST, cache)
    assert server.logins == ["Basic " + base64.b64encode(b"me:secret").decode()] * 2


async def test_sdist_from_extra_index_when_the_first_fails(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_index(server, monkeypatch, f"<a href='/f/some-thing-1.0.zip#sha256={SHA256}'>s</a>")
    server.put("/f/some-thing-1.0.zip", CONTENT)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", server.url + "/simple")
    assert (await fetch_one(SDIST, cache)).name == "some-thing-1.0.zip"


async def test_sdist_from_a_directory(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links of mine"
    links.mkdir()
    (links / "some_thing-1.0.tar.gz").write_bytes(CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", links.as_uri())
    assert (await fetch_one(SDIST, cache)).read_bytes() == CONTENT


async def test_sdist_that_is_nowhere(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_index(server, monkeypatch, "<a href='/f/some-thing-2.0.zip'>s</a>")
    with pytest.raises(SourceError, match="no package index") as caught:
        await fetch_one(SDIST, cache)
    assert not isinstance(caught.value, NotFoundError)


async def test_sdist_whose_index_is_down(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(FetchError):
        await fetch_one(SDIST, cache)


async def test_sdist_with_another_digest(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_index(server, monkeypatch, f"<a href='/f/some-thing-1.0.zip#sha256={ELSEWHERE}'>s</a>")
    with pytest.raises(SourceError, match="another digest"):
        await fetch_one(SDIST, cache)


async def test_index_cannot_name_files_of_the_host(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some-thing-1.0.zip").write_bytes(CONTENT)
    put_index(server, monkeypatch, f"<a href='{(tmp_path / 'some-thing-1.0.zip').as_uri()}'>s</a>")
    with pytest.raises(SourceError, match="no package index"):
        await fetch_one(SDIST, cache)
