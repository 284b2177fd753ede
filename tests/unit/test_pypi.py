"""Reading pip's settings and the pages of a package index."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.builder.pypi import (
    Candidate,
    choose,
    is_sdist,
    parse_pip_settings,
    project_pages,
    read_page,
    redacted,
    split_login,
)
from offloadd.errors import SourceError

DEFAULT = "https://index.test/simple"
GOOD = "a" * 64
OTHER = "b" * 64


def test_pip_settings_default() -> None:
    settings = parse_pip_settings("", default_index=DEFAULT)
    assert settings.indexes == ("https://index.test/simple/",)
    assert settings.find_links == ()


def test_pip_settings_environment_wins_over_command_and_global() -> None:
    text = (
        ":env:.extra-index-url='https://b.test/simple https://c.test/simple/'\n"
        "download.cert='/download.pem'\n"
        "global.cert='/global.pem'\n"
        "global.extra-index-url='https://never.test/'\n"
        "install.index-url='https://never.test/'\n"
        "global.index-url='https://a.test/simple/'\n"
    )
    settings = parse_pip_settings(text, default_index=DEFAULT)
    assert settings.indexes == ("https://a.test/simple/", "https://b.test/simple/", "https://c.test/simple/")
    assert settings.cert == "/download.pem"


def test_pip_settings_no_index() -> None:
    settings = parse_pip_settings("global.no-index='true'\nglobal.find-links='/wheels'\n", default_index=DEFAULT)
    assert settings.indexes == ()
    assert project_pages(settings, "any") == ["file:///wheels"]


def test_pip_settings_multi_line_value() -> None:
    settings = parse_pip_settings(r"global.extra-index-url='\nhttps://b.test\nhttps://c.test'", default_index=DEFAULT)
    assert settings.indexes[1:] == ("https://b.test/", "https://c.test/")


def test_settings_do_not_show_the_proxy() -> None:
    settings = parse_pip_settings("global.proxy='http://user:secret@proxy.test:1'", default_index=DEFAULT)
    assert settings.proxy
    assert "secret" not in repr(settings)


@given(st.text())
def test_pip_settings_survive_any_text(text: str) -> None:
    parse_pip_settings(text, default_index=DEFAULT)


def test_project_page_has_the_normal_name() -> None:
    settings = parse_pip_settings("", default_index=DEFAULT)
    assert project_pages(settings, "Zope.Interface__x") == ["https://index.test/simple/zope-interface-x/"]


@pytest.mark.parametrize(
    ("filename", "name", "version", "answer"),
    [
        ("holidays-0.9.11.tar.gz", "holidays", "0.9.11", True),
        ("python-dateutil-2.8.2.tar.gz", "python_dateutil", "2.8.2", True),
        ("python_dateutil-2.9.0.post0.tar.gz", "python-dateutil", "2.9.0.post0", True),
        ("zope.interface-5.0.zip", "zope-interface", "5.0", True),
        ("thing-1.0+local_2.tar.gz", "thing", "1.0+local-2", True),
        ("holidays-0.9.11-py3-none-any.whl", "holidays", "0.9.11", False),
        ("holidays-0.9.1.tar.gz", "holidays", "0.9.11", False),
        ("holidays-extra-0.9.11.tar.gz", "holidays", "0.9.11", False),
        ("holidays.tar.gz", "holidays", "0.9.11", False),
        ("-1.tar.gz", "holidays", "1", False),
    ],
)
def test_is_sdist(filename: str, name: str, version: str, answer: bool) -> None:
    assert is_sdist(filename, name, version) is answer


def test_html_page() -> None:
    body = (
        b"<!DOCTYPE html><html><head><base href='https://files.test/p/'></head><body>"
        b"<a href='thing-1.0.tar.gz#sha256=" + GOOD.encode() + b"' data-requires-python='&gt;=3'>thing</a>"
        b"<a href='../q/thing%2B-2.0.tar.gz#md5=0'>x</a><a>no link</a></body>"
    )
    assert read_page("https://index.test/simple/thing/", "text/html", body) == [
        Candidate(filename="thing-1.0.tar.gz", url="https://files.test/p/thing-1.0.tar.gz", sha256=GOOD),
        Candidate(filename="thing+-2.0.tar.gz", url="https://files.test/q/thing%2B-2.0.tar.gz"),
    ]


def test_json_page() -> None:
    files = [{"filename": "thing-1.0.tar.gz", "url": "../../f/thing-1.0.tar.gz", "hashes": {"sha256": GOOD}}]
    page = json.dumps({"files": files}).encode()
    [candidate] = read_page("https://index.test/simple/thing/", "application/vnd.pypi.simple.v1+json", page)
    assert candidate == Candidate(filename="thing-1.0.tar.gz", url="https://index.test/f/thing-1.0.tar.gz", sha256=GOOD)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"files": [1]}', b'{"files": [{}]}', b'{"files": 3}', b"\xff"])
def test_wrong_json_page(body: bytes) -> None:
    with pytest.raises(SourceError, match="not JSON"):
        read_page("https://index.test/simple/thing/", "application/vnd.pypi.simple.v1+json", body)


@given(st.binary(max_size=200))
def test_any_html_page(body: bytes) -> None:
    read_page("https://index.test/simple/thing/", "text/html", body)


def test_login_goes_with_the_same_host_only() -> None:
    body = b"<a href='/f/a-1.zip'></a><a href='https://other.test/a-1.zip'></a><a href='http://index.test/a-1.zip'></a>"
    urls = [found.url for found in read_page("https://me:pw@index.test/simple/a/", "text/html", body)]
    assert urls == ["https://me:pw@index.test/f/a-1.zip", "https://other.test/a-1.zip", "http://index.test/a-1.zip"]


def test_split_login_and_redacted() -> None:
    assert split_login("https://me:p%40w@index.test:8/x?y#z") == ("https://index.test:8/x?y#z", ("me", "p@w"))
    assert split_login("https://index.test/x") == ("https://index.test/x", None)
    assert redacted("https://me:pw@index.test:8/x?token=1#z") == "https://index.test:8/x"


def candidates(*digests: str) -> list[Candidate]:
    return [Candidate(filename="a-1.tar.gz", url=f"https://{at}.test/a-1.tar.gz", sha256=d) for at, d in enumerate(digests)]


def test_choose_prefers_the_right_digest() -> None:
    found = choose(candidates(OTHER, "", GOOD), name="a", version="1", sha256=GOOD)
    assert found is not None
    assert found.sha256 == GOOD


def test_choose_takes_an_unknown_digest() -> None:
    found = choose(candidates(OTHER, ""), name="a", version="1", sha256=GOOD)
    assert found is not None
    assert found.sha256 == ""


def test_choose_nothing() -> None:
    assert choose(candidates(GOOD), name="a", version="2", sha256=GOOD) is None


def test_choose_refuses_another_digest() -> None:
    with pytest.raises(SourceError, match="another digest") as caught:
        choose(candidates(OTHER), name="a", version="1", sha256=GOOD)
    assert OTHER in caught.value.detail
    assert GOOD in caught.value.detail
    assert not caught.value.retryable
