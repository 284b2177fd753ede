"""Nix's list of machines: eight columns, and back."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offloadd.errors import ConfigError, NotFoundError, UsageError
from offloadd.model.offer import Offer
from offloadd.nix.machines import NixScheme, nix_line, render_port, render_ssh_config
from offloadd.nix.read import read_nix

from .offers import KEY, any_offers, make_offer, without_name, words

KEY64 = b64encode(KEY.encode()).decode()


def test_the_eight_columns() -> None:
    offer = make_offer(systems=("x86_64-linux", "i686-linux"), features=("kvm", "big-parallel"), parallel_builds=3, speed=0.5)
    rest = f"x86_64-linux,i686-linux /secrets/vm/id_ed25519 3 0.5 kvm,big-parallel - {KEY64}"
    assert nix_line(offer) == f"ssh-ng://offloading@127.0.0.1:11022 {rest}"
    assert nix_line(offer, "ssh") == f"ssh://offloading@127.0.0.1:11022 {rest}"
    assert nix_line(offer, "ssh", alias="offload-vm") == f"ssh://offload-vm {rest}"
    assert nix_line(offer, port=False) == f"ssh-ng://offloading@127.0.0.1 {rest}"
    assert " 1 1 - - " in nix_line(make_offer())
    assert nix_line(make_offer(host="fe80::1")).startswith("ssh-ng://offloading@[fe80::1]:11022 ")


def test_the_port_in_ssh_config() -> None:
    assert render_port(make_offer(host="far.example", port=2222)) == "Host far.example\n  Port 2222\n"
    assert render_port(make_offer(host="fe80::1", port=2222)) == "Host fe80::1 [fe80::1]\n  Port 2222\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_offers(words.filter(lambda word: "/" not in word)), max_size=3), st.sampled_from(["ssh", "ssh-ng"]))
def test_what_is_written_is_read_the_same(tmp_path: Path, offers: list[Offer], scheme: NixScheme) -> None:
    file = tmp_path / "machines"
    file.write_text("".join(f"{nix_line(offer, scheme)}\n" for offer in offers))
    found = read_nix(file)
    # Nix knows of no load.
    assert [without_name(offer) for _, offer in found] == [
        without_name(offer) | {"overload_threshold": None} for offer in offers
    ]
    assert [line for line, _ in found] == [*range(1, len(offers) + 1)]


@given(any_offers())
def test_a_line_has_eight_words_whatever_goes_in(offer: Offer) -> None:
    try:
        line = nix_line(offer)
    except UsageError:  # some texts cannot be written at all
        assert any(
            not word.isascii() or not word.isalnum() for word in (offer.host, offer.user, offer.private_key, *offer.features)
        )
        return
    assert len(line.split()) == 8
    assert len(line.splitlines()) == 1
    assert not set(line) & set("#;")


@pytest.mark.parametrize("path", ["/a b", "/a\tb", "/a#b", "/a;b", "/a\nb", "", "-", "@/etc/nix/machines"])
def test_what_nix_cannot_have_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="no way to write"):
        nix_line(make_offer(private_key=path))


def test_the_part_of_ssh_config() -> None:
    assert render_ssh_config(make_offer(private_key="/a b/50%/id"), "offload-vm") == (
        "Host offload-vm\n  HostName 127.0.0.1\n  Port 11022\n  User offloading\n  HostKeyAlias offload-vm\n"
        '  IdentityFile "/a b/50%%/id"\n  IdentitiesOnly yes\n'
    )
    for path in ('/a"b', "/a\nProxyCommand rm"):
        with pytest.raises(UsageError, match="no way to write"):
            render_ssh_config(make_offer(private_key=path), "offload-vm")


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    more, missing = tmp_path / "more", tmp_path / "missing"
    more.write_text(f"ssh://Tower.example x86_64-linux /k 2 1.5 a b {KEY64}\n")
    file = tmp_path / "machines"
    uri = f"ssh-ng://me@[fe80::1]:2222?ssh-key=/of-uri&base64-ssh-public-host-key={KEY64}"
    file.write_text(
        f"# builders\n\n@{more}\n@{missing}\n{uri} i686-linux # enough\nTower.example armv7l-linux /k - - - - {KEY64}\n"
    )
    first, second, third = read_nix(file)
    assert (first.line, first.offer.host, first.offer.user, first.offer.port) == (1, "Tower.example", "root", 22)
    assert (first.offer.features, first.offer.speed, first.offer.parallel_builds) == (("a", "b"), 1.5, 2)
    assert (second.line, second.offer.host, second.offer.port, second.offer.private_key) == (5, "fe80::1", 2222, "/of-uri")
    assert (third.offer.machine, third.offer.systems) == ("Tower.example-22", ("armhf-linux",))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ssh://h", "names no system types"),
        ("ssh://h x86_64-linux", "names no private key"),
        ("ssh://h x86_64-linux /k", "names no public host key"),
        (f"s3://h x86_64-linux /k 1 1 - - {KEY64}", "is no ssh://HOST"),
        ("ssh://h x86_64-linux /k 1 1 - - ###", "names no public host key"),
        ("ssh://h x86_64-linux /k 1 1 - - ??", "is no base64"),
        ("ssh://h x86_64-linux /k 1 1 - - aGVsbG8=", "TYPE BASE64"),
        (f"ssh://h x86_64-linux /k many 1 - - {KEY64}", "many"),
        (f"ssh://h x86_64-linux /k 1 1 - - {KEY64} more", "more than eight"),
        (f"ssh://h:99999 x86_64-linux /k 1 1 - - {KEY64}", "(?i)port"),
        (f"ssh://h:x pdp11-unix /k 1 1 - - {KEY64}", "(?i)port"),
        (f"ssh://h pdp11-unix /k 1 1 - - {KEY64}", "pdp11-unix"),
    ],
)
def test_a_wrong_line_is_told_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "machines"
    file.write_text(f"# first\n{line}\n{nix_line(make_offer())}\nssh://too-little\n")
    with pytest.raises(ConfigError, match=words) as caught:
        read_nix(file)
    assert {problem.line for problem in caught.value.problems} >= {4}
    assert str(caught.value).startswith(f"{file}:2")


def test_files_that_include_each_other_come_to_an_end(tmp_path: Path) -> None:
    file = tmp_path / "machines"
    file.write_text(f"@{file}\n")
    with pytest.raises(ConfigError, match="include each other"):
        read_nix(file)
    with pytest.raises(NotFoundError):
        read_nix(tmp_path / "missing")
