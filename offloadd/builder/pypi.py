"""Find a source distribution in the package index that pip is set up for, without running any of its code.

`pip download` asks an old source distribution for its metadata by running its setup.py, on the host and today.  So pip is only
asked for its settings; the pages of the index are read here.

Sources: the simple repository API (PEP 503 for HTML, PEP 691 for JSON) and pip's manual, "Configuration" (names and precedence
of the settings).  Everything in this module but `read_pip_settings` is pure.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

import trio

from offloadd.errors import HostError, SourceError

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_SDIST_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_SETTING = re.compile(r"(?P<section>[a-z:]+)\.(?P<name>[a-z0-9-]+)=(?P<value>.*)")
# Later ones win; pip reads the variables of the environment last.
_SECTIONS = ("global", "download", ":env:")


@dataclass(frozen=True, kw_only=True)
class PipSettings:
    """What pip is told about its package index."""

    indexes: tuple[str, ...]
    """URLs of simple indexes, each ending in a slash, most important first."""
    find_links: tuple[str, ...] = ()
    """URLs or directories of pages that link to files."""
    cert: str = ""
    """A file with the certificates of more authorities."""
    client_cert: str = ""
    proxy: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file that an index offers."""

    filename: str
    url: str
    sha256: str = ""
    """Empty when the index does not say."""


async def read_pip_settings() -> PipSettings:
    """Ask pip for its settings (configuration files and environment).

    Raises:
        HostError: there is no pip, or it cannot read its configuration.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise HostError(
            "pip does not tell its settings",
            subject="pip",
            hint=f"install pip for {sys.executable}; it says which package index to use",
            detail=done.stderr.decode(errors="replace"),
        )
    return parse_pip_settings(done.stdout.decode(errors="replace"), default_index=_default_index())


def _default_index() -> str:
    # pip's own constant: where its packages come from is pip's business, not ours.
    try:
        return str(importlib.import_module("pip._internal.models.index").PyPI.simple_url)
    except (ImportError, AttributeError):
        return ""


def parse_pip_settings(text: str, *, default_index: str) -> PipSettings:
    """Read what `pip config list` prints: lines of `section.name='value'`."""
    sections: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in text.splitlines():
        match = _SETTING.fullmatch(line.strip())
        if match and match["section"] in sections:
            sections[match["section"]][match["name"]] = _unquoted(match["value"])
    settings = {name: value for section in _SECTIONS for name, value in sections[section].items()}
    indexes = [settings.get("index-url") or default_index, *settings.get("extra-index-url", "").split()]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    return PipSettings(
        indexes=tuple(index.rstrip("/") + "/" for index in indexes if index),
        find_links=tuple(settings.get("find-links", "").split()),
        cert=settings.get("cert", ""),
        client_cert=settings.get("client-cert", ""),
        proxy=settings.get("proxy", ""),
    )


def _unquoted(value: str) -> str:
    try:
        return str(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return value


def normalized(name: str) -> str:
    """A project's name as the index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_sdist(filename: str, name: str, version: str) -> bool:
    """Whether `filename` is the source distribution of `name` in `version`, by its name.

    Old ones keep dashes and dots in their names, so every dash may be the one before the version.
    """
    suffix = next((suffix for suffix in _SDIST_SUFFIXES if filename.lower().endswith(suffix)), None)
    if suffix is None:
        return False
    stem = filename[: -len(suffix)]
    dashes = (match.start() for match in re.finditer("-", stem))
    return any(normalized(stem[:at]) == normalized(name) and _plain(stem[at + 1 :]) == _plain(version) for at in dashes)


def _plain(version: str) -> str:
    # A local version's separator may be any of these in a file name.
    return re.sub(r"[-_+]", ".", version.lower())


def project_pages(settings: PipSettings, name: str) -> list[str]:
    """The URLs of the pages that may link to files of `name`, in the order in which they are asked."""
    links = [link if "://" in link else Path(link).absolute().as_uri() for link in settings.find_links]
    return links + [urljoin(index, f"{normalized(name)}/") for index in settings.indexes]


def read_page(page_url: str, content_type: str, body: bytes) -> list[Candidate]:
    """The files that a page of an index links to.

    Raises:
        SourceError: the page is not what its content type says.
    """
    if "json" not in content_type:
        parser = _Links(page_url)
        parser.feed(body.decode(errors="replace"))
        return parser.found
    try:
        files: list[dict[str, Any]] = json.loads(body)["files"]
        return [_json_candidate(page_url, entry) for entry in files]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise SourceError("the package index sent a page that is not JSON of PEP 691", subject=redacted(page_url)) from exc


def _json_candidate(page_url: str, entry: dict[str, Any]) -> Candidate:
    digest = str(entry.get("hashes", {}).get("sha256", ""))
    return Candidate(
        filename=str(entry["filename"]), url=with_login_of(page_url, urljoin(page_url, entry["url"])), sha256=digest
    )


class _Links(HTMLParser):
    """Collects the anchors of a page of PEP 503."""

    def __init__(self, page_url: str) -> None:
        super().__init__()
        self._page_url = self._base = page_url
        self.found: list[Candidate] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href and tag == "base":
            self._base = urljoin(self._page_url, href)
        elif href and tag == "a":
            url, fragment = urldefrag(urljoin(self._base, href))
            digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
            filename = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
            self.found.append(Candidate(filename=filename, url=with_login_of(self._page_url, url), sha256=digest))


def with_login_of(page_url: str, url: str) -> str:
    """Give `url` the user and password of the page that linked to it, when it is on the same host and scheme."""
    page, link = urlsplit(page_url), urlsplit(url)
    login, at, _ = page.netloc.rpartition("@")
    same = (page.scheme, page.hostname, page.port) == (link.scheme, link.hostname, link.port)
    if not at or not same or "@" in link.netloc:
        return url
    return urlunsplit(link._replace(netloc=f"{login}@{link.netloc}"))


def split_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """`url` without user and password, and these two (None: it has none)."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = login.partition(":")
    return urlunsplit(parts._replace(netloc=host)), (unquote(user), unquote(password))


def redacted(url: str) -> str:
    """`url` without user, password, query and fragment: fit for a message or a log."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def choose(candidates: list[Candidate], *, name: str, version: str, sha256: str) -> Candidate | None:
    """The candidate to fetch: one with the right digest, else one whose digest the index does not tell; None: there is none.

    Raises:
        SourceError: the index has this source distribution, but with another digest.
    """
    named = [candidate for candidate in candidates if is_sdist(candidate.filename, name, version)]
    for wanted in (sha256, ""):
        for candidate in named:
            if candidate.sha256 == wanted:
                return candidate
    if named:
        offered = "\n".join(f"{candidate.filename}: sha256 {candidate.sha256}" for candidate in named)
        raise SourceError(
            "the package index offers it with another digest",
            subject=f"{name}=={version}",
            hint="was the digest copied for another file, such as a wheel?",
            detail=f"wanted: sha256 {sha256}\n{offered}",
        )
    return None
