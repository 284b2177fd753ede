"""machines.scm: what is written, and what is read back without being run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import ConfigError, Problem
from offloadd.guix.live import render_live
from offloadd.guix.machines import guix_datum, render_guix
from offloadd.guix.read import read_guix
from offloadd.guix.scheme import Datum, read_all
from offloadd.model.offer import Offer

from .offers import KEY, any_offers, make_offer, without_name

ONE = f"""\
; Made by offload: a change is lost.
(list
 ; vm
 (build-machine
   (name "127.0.0.1")
   (port 11022)
   (systems '("x86_64-linux" "i686-linux"))
   (user "offloading")
   (host-key "{KEY}")
   (private-key "/secrets/vm/id_ed25519")
   (parallel-builds 1)
   (speed 1.0)
   (features '())
   (overload-threshold #f)))
"""


def test_the_file_of_one_machine() -> None:
    assert render_guix([make_offer(systems=("x86_64-linux", "i686-linux"), overload_threshold=None)]) == ONE


@given(st.lists(any_offers(), max_size=3))
def test_what_is_written_is_read_the_same(offers: list[Offer]) -> None:
    text = render_guix(offers)
    assert text.isascii()
    assert text == render_guix(offers)
    found = read_guix(text, "machines.scm")
    assert [without_name(offer) for _, offer in found] == [without_name(offer) for offer in offers]
    assert [text.splitlines()[line - 1].strip() for line, _ in found] == ["(build-machine"] * len(offers)
    assert len({offer.machine for _, offer in found}) == len(offers)


@given(st.lists(any_offers(), max_size=3))
def test_the_datum_has_the_same_fields(offers: list[Offer]) -> None:
    (datum,) = read_all(guix_datum(offers), "answer")
    assert isinstance(datum.value, tuple)
    names = ["machine", "name", "port", "systems", "user", "host-key", "private-key", "parallel-builds", "speed", "features"]
    for entry, offer in zip(datum.value, offers, strict=True):
        assert isinstance(entry.value, tuple)
        fields = dict(_pair(field) for field in entry.value)
        assert list(fields) == [*names, "overload-threshold"]
        assert fields["name"].value == offer.host
        assert fields["private-key"].value == offer.private_key


def _pair(field: Datum) -> tuple[str, Datum]:
    assert isinstance(field.value, tuple)
    name, value = field.value
    return str(name.value), value


WRITTEN_BY_HAND = f"""\
;; -*- mode: scheme -*-
(list (build-machine
        (name "eightysix.example.org")
        (systems (list "x86_64-linux" "i686-linux"))
        (host-key "{KEY} root@eightysix\\n")
        (user "bob") ; that's me
        (compression "none") (daemon-socket "/run/x")
        (speed 2))
      #;(build-machine (name "off"))
      (build-machine
        (name "eightysix.example.org") (port 2222)
        (system "armhf-linux")
        (host-key "{KEY}")
        (user "alice")
        (private-key #| a comment |# "/home/alice/.ssh/id")))
"""


def test_a_file_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/bob")
    (line, first), (_, second) = read_guix(WRITTEN_BY_HAND, "m.scm", {"other"})
    assert line == 2
    assert (first.machine, first.host, first.port, first.user) == ("eightysix.example.org", "eightysix.example.org", 22, "bob")
    assert first.systems == ("x86_64-linux", "i686-linux")
    # Guix's defaults.
    assert first.private_key == "/home/bob/.ssh/id_rsa"
    assert (first.speed, first.parallel_builds, first.overload_threshold, first.features) == (2.0, 1, 0.8, ())
    assert second.machine == "eightysix.example.org-2222"
    assert (second.systems, second.private_key) == (("armhf-linux",), "/home/alice/.ssh/id")


def test_names_that_are_taken_are_not_given() -> None:
    ((_, offer),) = read_guix(render_guix([make_offer(host="tower")]), "m.scm", {"tower", "tower-11022"})
    assert offer.machine == "tower-2"


@pytest.mark.parametrize("text", ["'()", "(list)", "; nothing\n'()\n", "(quote ())"])
def test_lists_of_none(text: str) -> None:
    assert read_guix(text, "m.scm") == []


def problems_of(text: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        read_guix(text, "m.scm")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("", 1, 0),
        ("(define x 1)\n(list x)", 1, 1),
        ("(use-modules (guix))\n'()", 1, 1),
        ("(map f '())", 1, 1),
        ("(list\n (f))", 2, 2),
        ("(list\n  x)", 2, 3),
        ("'()\n '()", 2, 2),
        ('(list (build-machine\n  (name (string-append "a" "b"))))', 2, 9),
        ("(list (build-machine\n  (systems '(x))))", 2, 12),
        ("(list (build-machine\n  (inherit other)))", 2, 3),
        ("(list (build-machine\n  (port 2.5)))", 2, 9),
        ("(list (build-machine\n  (speed #t)))", 2, 10),
        ('(list (build-machine\n (user "a") (user "b")))', 2, 13),
        ("(list (build-machine\n name))", 2, 2),
        ("(quote)", 1, 1),
        ("(list (build-machine\n  (systems (quote))))", 2, 12),
        (f"(list (build-machine\n  (speed {'9' * 400})))", 2, 10),
    ],
)
def test_code_is_refused_with_its_place(text: str, line: int, column: int) -> None:
    first = problems_of(text)[0]
    assert (first.file, first.line, first.column) == ("m.scm", line, column)


def test_all_that_is_wrong_is_told_at_once() -> None:
    text = render_guix([make_offer(), make_offer()]).replace("11022", "99999", 1).replace('"x86_64-linux"', '"pdp11-unix"', 1)
    text = text.replace("(list", "(list\n (build-machine (speed fast))", 1)
    told = [(problem.line, problem.field) for problem in problems_of(text)]
    assert told == [(3, "speed"), (7, "port"), (8, "systems")]
    assert [problem.field for problem in problems_of("(list (build-machine))")] == [
        "host",
        "host-key",
        "systems",
        "user",
    ]


def test_the_live_file_is_a_program_and_says_so() -> None:
    text = render_live(Path('/run/a "b"\\/s.sock'), 1000, Path("/etc/guix/offload/ssh"))
    assert '(define socket-file "/run/a \\"b\\"\\\\/s.sock")' in text
    assert "(define owner 1000)" in text
    with pytest.raises(ConfigError, match="this is code"):
        read_guix(text.replace("#\\", "").replace("`", ""), "m.scm")
    assert "(define keys #f)" in render_live(Path("/s"), 0)


def test_any_text_may_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / '"))(exit)(("'
    assert str(read_guix(render_guix([make_offer(private_key=str(path))]), "m")[0].offer.private_key) == str(path)
